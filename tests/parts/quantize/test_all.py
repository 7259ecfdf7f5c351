"""What every quantiser of a cache must do."""

import pytest
import torch

import attlas
from attlas.attach import attach
from attlas.cache.prompt import prefill
from attlas.calibration import calibrate
from attlas.contract.families import distinct
from attlas.errors import UserError
from attlas.hf.caches import cache_of, with_cache
from attlas.storage import load_cache, save_cache
from attlas.storage.layer import StoredLayer
from tiny_models import decoder, greedy, prompt

#: Small blocks, so that a prompt of some 30 tokens is encoded.
SMALL = {
    "quantized-cache": {"bits": 4, "key_group": 8, "recent": 4},
    "zipcache": {"block": 8, "keys": "token"},
    "zipcache channels": {"block": 8},
    "qaq-quality-adaptive-quantization": {"block": 8, "q_norm": 4.0, "key_error": 0.1},
    "qaq-quality-adaptive-quantization token": {"block": 8, "level": "token", "key_error": 0.1},
    "qaq-quality-adaptive-quantization head": {"block": 8, "level": "head", "bits": 3},
    "qaq-quality-adaptive-quantization normal": {"block": 8, "method": "normal", "bits": 4},
    "akvq-vl": {"block": 8, "recent": 4, "pivots": 3, "early_layers": 1, "images": [(3, 9)]},
    "wkvquant": {"block": 4, "steps": 2, "length": 24, "channel_group": 8},
}  # fmt: skip

#: Options with which nothing is rounded, or as little as 16 bits round.
WHOLE = {
    "quantized-cache": {"bits": 16},
    "zipcache": {"salient_bits": 16, "other_bits": 16},
    "qaq-quality-adaptive-quantization": {"bits": 16, "outliers": 0.0},
    "akvq-vl": {"bits": 16, "salient_bits": 16},
    "wkvquant": {"bits": 16},
}


def made(name, model, **options):
    part = attlas.make(name.split()[0], **{**SMALL.get(name, {}), **options})
    if name == "wkvquant":
        part.calibration = calibrate(model, part, [prompt(1, 24, seed=s) for s in (5, 6)])
    return part


@pytest.fixture(scope="module")
def llama():
    return decoder("llama")


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("kind", distinct("rotary", "soft-caps"))
def test_sixteen_bits_are_the_model(name, kind):
    model, ids = decoder(kind), prompt(2, 30)
    fed = prompt(2, 24, seed=2)
    with torch.no_grad():
        expected = model(torch.cat([ids, fed], 1)).logits[:, 30:]
        with attach(model, made(name, model, **WHOLE[name])) as session:
            cache = cache_of(model(ids, use_cache=True))
            found = [
                model(fed[:, i : i + 3], **with_cache(model, cache)).logits for i in range(0, 24, 3)
            ]
            full = [c for c in session.cache.layers if isinstance(c, StoredLayer)]
            assert all(layer.bodies for layer in full)
    assert torch.allclose(torch.cat(found, 1), expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("name", SMALL)
def test_padding_changes_nothing(name, llama):
    part = made(name, llama)
    short, long = prompt(1, 21), prompt(1, 30, seed=4)
    padded = torch.cat([torch.zeros(1, 9, dtype=torch.long), short], 1)
    ids = torch.cat([padded, long])
    with attach(llama, part):
        alone = greedy(llama, short, 20)
    with attach(llama, part):
        together = greedy(llama, ids, 20, attention_mask=(ids != 0).long())
    assert together[0] == alone[0]


@pytest.mark.parametrize("name", SMALL)
def test_padding_on_the_right(name):
    llama = decoder("llama").double()  # in which no code lies between two
    part, short = made(name, llama), prompt(1, 21)
    ids = torch.cat([torch.cat([short, torch.zeros(1, 9, dtype=torch.long)], 1), prompt(1, 30, 4)])
    mask, fed = (ids != 0).long(), prompt(2, 16, seed=7)

    def read(ids, fed, mask):
        with torch.no_grad(), attach(llama, part):
            at = (mask.cumsum(-1) - 1).clamp(min=0)
            cache = cache_of(llama(ids, attention_mask=mask, position_ids=at, use_cache=True))
            found = []
            for i in range(fed.shape[1]):
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
                at = mask.sum(-1, keepdim=True) - 1
                found.append(
                    llama(fed[:, i : i + 1], **with_cache(llama, cache), attention_mask=mask,
                          position_ids=at).logits
                )  # fmt: skip
        return torch.cat(found, 1)

    together = read(ids, fed, mask)
    alone = read(short, fed[:1], torch.ones_like(short))
    assert torch.allclose(together[:1], alone, atol=2e-3)


@pytest.mark.parametrize("name", SMALL)
def test_forks_and_chunks_agree(name):
    llama, ids = decoder("llama").double(), prompt(2, 30)  # in which no code lies between two
    part = made(name, llama)
    question = prompt(2, 12, seed=3)
    parent = prefill(llama, ids, [part], chunk=7)
    with torch.no_grad(), attach(llama, part):
        cache = cache_of(llama(ids, use_cache=True))
        whole = [llama(question[:, :5], **with_cache(llama, cache)).logits]
        whole += [
            llama(question[:, i : i + 1], **with_cache(llama, cache)).logits for i in range(5, 12)
        ]
        for _ in range(2):  # a fork leaves its prompt as it was
            fork = parent.fork(part)
            found = [llama(question[:, :5], **with_cache(llama, fork)).logits]
            found += [
                llama(question[:, i : i + 1], **with_cache(llama, fork)).logits
                for i in range(5, 12)
            ]
            assert torch.allclose(torch.cat(found, 1), torch.cat(whole, 1), atol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_chunked_generation(name, llama):
    part, ids = made(name, llama), prompt(1, 30)
    with attach(llama, part):
        expected = greedy(llama, ids, 12)
    with attach(llama, part, chunked=True):
        assert greedy(llama, ids, 12, prefill_chunk_size=8) == expected


@pytest.mark.parametrize("name", SMALL)
def test_bytes_are_those_of_what_is_held(name, llama):
    part, ids = made(name, llama), prompt(1, 90)
    with torch.no_grad():
        with attach(llama) as session:
            llama(ids, use_cache=True)
            full = session.kv_bytes
        with attach(llama, part) as session:
            llama(ids, use_cache=True)
            held, layers = session.kv_bytes, session.cache.layers
            bodies = [body for layer in layers for body in layer.bodies.values()]
            storages = {
                t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for layer in layers
                for t in [layer.keys, layer.values, *_remembered(layer),
                          *(t for body in layer.bodies.values() for t in body.tensors.values())]
                if t.numel()
            }  # fmt: skip
    assert held < full
    assert bodies
    assert sum(storages.values()) == pytest.approx(held, rel=0.02)


def _remembered(layer):
    return [t for state in layer.learned.values() for t in state.tensors.values()]


@pytest.mark.parametrize("name", SMALL)
def test_rows_and_files(name, llama, tmp_path):
    part, ids = made(name, llama), prompt(3, 30)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with torch.no_grad(), attach(llama, part):
        cache = cache_of(llama(ids, attention_mask=mask, use_cache=True))
        layer = cache.layers[1]
        save_cache(cache, tmp_path / "cache", llama)
        before = [t.clone() for t in layer.read()[:2]]
        for again in (load_cache(tmp_path / "cache", llama).layers[1], layer):
            order = torch.tensor([2, 0, 1, 1])
            again.reorder_cache(order)
            valid = (again.original_positions() >= 0)[..., None]
            for ours, old in zip(again.read()[:2], before, strict=True):
                assert torch.equal(ours * valid, old[order] * valid)


@pytest.mark.parametrize("name", SMALL)
def test_with_an_evicting_part(name, llama):
    part, ids = made(name, llama), prompt(2, 60)
    policy = attlas.make("key-norm-eviction", keep=0.5, skip_layers=())
    with torch.no_grad(), attach(llama, policy, part) as session:
        cache = cache_of(llama(ids, use_cache=True))
        layer = session.cache.layers[2]
        assert layer.bodies
        assert ((layer.original_positions() >= 0).sum(dim=-1) == 30).all()
        for i in range(12):
            out = llama(ids[:, i : i + 1], **with_cache(llama, cache))
        assert out.logits.isfinite().all()


@pytest.mark.parametrize("name", SMALL)
def test_half_precision(name):
    model, ids = decoder("llama").to(torch.bfloat16), prompt(2, 30)
    with attach(model, made(name, model)):
        out = greedy(model, ids, 12)
    assert len(out[0]) == 12


@pytest.mark.parametrize("name", WHOLE)
def test_sliding_windows_stay(name):
    model, ids = decoder("gemma3"), prompt(2, 30)
    with torch.no_grad(), attach(model, made(name, model)) as session:
        model(ids, use_cache=True)
        assert [type(layer) is StoredLayer for layer in session.cache.layers] == [False, True] * 2


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("quantized-cache", {"bits": 5}, "bits"),
        ("quantized-cache", {"key_bits": 16}, "16 bits"),
        ("quantized-cache", {"key_group": 0}, "key_group"),
        ("zipcache", {"ratio": 1.5}, "ratio"),
        ("zipcache", {"other_bits": 7}, "other_bits"),
        ("zipcache", {"keys": "head"}, "keys"),
        ("zipcache", {"probes": 0.0}, "probes"),
        ("qaq", {"key_error": 0.0}, "key_error"),
        ("qaq", {"bits": 17}, "bits"),
        ("qaq", {"method": "normal"}, "normal"),
        ("qaq", {"level": "batch"}, "level"),
        ("qaq", {"centre": "low"}, "centre"),
        ("akvq-vl", {"bits": 6}, "bits"),
        ("akvq-vl", {"images": [(4, 2)]}, "images"),
        ("akvq-vl", {"pivots": -1}, "pivots"),
        ("akvq-vl", {"clip": 0.0}, "clip"),
        ("wkvquant", {"bits": 12}, "bits"),
        ("wkvquant", {"recent": 0}, "recent"),
        ("wkvquant", {"rate": 0.0}, "rate"),
    ],
)
def test_bad_options_are_named(name, options, told):
    with pytest.raises((UserError, TypeError), match=told):  # the tests' types refuse words first
        attlas.make(name, **options)


def test_groups_that_do_not_divide_are_refused(llama):
    for part in (
        attlas.make("quantized-cache", channel_group=5),
        attlas.make("wkvquant", channel_group=5),
        attlas.make("akvq-vl", channel_group=5),
    ):
        with pytest.raises(UserError, match="channel_group"):
            part.formats(llama)
