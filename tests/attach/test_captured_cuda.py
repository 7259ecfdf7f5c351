"""On a GPU captured steps are CUDA graphs, and give what eager ones give."""

import gc

import pytest
import torch

import attlas
import captured_steps
import tiny_models
from attlas.attach import attach
from attlas.contract.families import FAMILIES, find

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", captured_steps.PARTS)
def test_the_steps_are_the_eager_ones(name, padded):
    model = find("llama").model(num_hidden_layers=2).double().cuda()
    ids, mask = tiny_models.prompt(3, 33).cuda(), None
    if padded:
        mask = torch.ones_like(ids)
        mask[0, :7] = 0
        mask[2, :20] = 0
    _, expected = captured_steps.decoded(model, name, 40, False, ids, mask)
    session, found = captured_steps.decoded(model, name, 40, "auto", ids, mask)
    assert session.why_not_captured is None
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", captured_steps.PARTS)
def test_by_kernels(name):
    """In bfloat16, whose kernels read lengths on the device; the steps are fed the same tokens."""
    model = find("llama").model(num_hidden_layers=2, hidden_size=256, head_dim=64).bfloat16().cuda()
    ids = tiny_models.prompt(2, 400).cuda()
    found = {}
    for compile in (False, "auto", True):
        parts = captured_steps.parts(name, model)
        with torch.no_grad(), attach(model, *parts, compile=compile) as session:
            cache = session_cache(model, session, ids[:, :300])
            found[compile] = torch.stack([
                model(ids[:, at : at + 1], **cache()).logits for at in range(300, 400)
            ])
            assert compile is False or session.why_not_captured is None
    for compile in ("auto", True):
        error = (found[compile] - found[False]).float().norm() / found[False].float().norm()
        assert error < 0.03


def session_cache(model, session, ids):
    from attlas.hf.caches import with_cache

    model(ids, use_cache=True)
    return lambda: with_cache(model, session.cache)


@pytest.mark.parametrize("family", [each.name for each in FAMILIES])
def test_families_are_captured_or_run_as_ever(family):
    ids, runs = tiny_models.prompt(2, 21).cuda(), []
    for compile in (False, "auto"):
        model = find(family).model().cuda()
        runs.append(captured_steps.decoded(model, "none", 12, compile, ids))
    torch.testing.assert_close(runs[1][1], runs[0][1], atol=2e-3, rtol=1e-2)
    assert torch.randn(3, device="cuda").isfinite().all()  # which a failed capture would keep from us


@pytest.mark.parametrize("name", [name for name, why in captured_steps.OURS.items() if why is None])
def test_decoders_of_ours(name):
    torch.manual_seed(0)
    config = attlas.DecoderConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, attention=name
    )
    model = attlas.Decoder(config).eval().cuda()
    ids = tiny_models.prompt(2, 21).cuda()
    expected = captured_steps.decoded(model, "none", 20, False, ids)[1]
    session, found = captured_steps.decoded(model, "none", 20, "auto", ids)
    assert session.why_not_captured is None
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-2)


def test_decoders_of_ours_capture_by_themselves():
    torch.manual_seed(0)
    for name in ("softmax", "multi-head-latent-attention", "differential-transformer", "arwkv-rwkv7"):
        config = attlas.DecoderConfig(
            vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, attention=name
        )
        model = attlas.Decoder(config).eval().cuda()
        ids = tiny_models.prompt(2, 21).cuda()
        given = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
        with attach(model, compile=False):
            expected = model.generate(ids, **given)
        assert model.generate(ids, **given).equal(expected)


def test_one_cache_after_another():
    """Graphs go with their caches, and their memory with them."""
    model = find("llama").model(num_hidden_layers=2).bfloat16().cuda()
    for length in (300, 4000, 700):
        ids = tiny_models.prompt(1, length).cuda()[:, :500].repeat(1, 8)[:, :length]
        for name in ("none", "4 bits", "quest"):
            session, found = captured_steps.decoded(model, name, 12, "auto", ids)
            assert session.why_not_captured is None
            assert torch.stack(found).isfinite().all()
            del session, found
            gc.collect()
            torch.cuda.empty_cache()


def test_pages_chosen_by_lengths_on_the_device():
    from attlas.cache.summaries import Portion, best_portion, first_best

    torch.manual_seed(0)
    for pages in (5, 64, 1000, 8192):
        scores = torch.randn(2, 3, pages, device="cuda").round(decimals=1)  # with equals
        there = torch.randint(1, pages + 1, (2, 3), device="cuda", dtype=torch.int32)
        portion = Portion(0.3)
        wanted = portion.of_rows(there)
        expected = first_best(scores.cpu(), there.cpu(), wanted.cpu(), portion.of(pages))
        assert best_portion(scores, portion, there).cpu().equal(expected)


def test_generate():
    model = find("llama").model(num_hidden_layers=2).cuda()
    ids = tiny_models.prompt(2, 24).cuda()
    plain = model.generate(ids, max_new_tokens=40, do_sample=False)
    with attach(model) as session:
        assert model.generate(ids, max_new_tokens=40, do_sample=False).equal(plain)
        assert session.why_not_captured is None
        beams = model.generate(ids, max_new_tokens=20, num_beams=3, do_sample=False)
    assert beams.equal(model.generate(ids, max_new_tokens=20, num_beams=3, do_sample=False))
    with attach(model, attlas.make("quantized-cache", bits=16)) as session:
        assert model.generate(ids, max_new_tokens=40, do_sample=False).equal(plain)
        assert session.why_not_captured is None
