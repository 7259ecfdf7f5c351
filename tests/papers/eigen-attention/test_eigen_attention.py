"""Eigen attention: a cache of coordinates in few directions."""

from __future__ import annotations

import random

import pytest
import torch

import tiny_models
from attlas.attach import Part, attach
from attlas.cache.folding import fold
from attlas.cache.prompt import prefill
from attlas.cache.selection import Selection
from attlas.calibration import Calibration, calibrate, windows
from attlas.contract.families import distinct, find
from attlas.errors import UserError
from attlas.hf.caches import cache_of, with_cache
from attlas.parts.evict.key_norm import KeyNorm
from attlas.parts.quantize.eigen_attention import EigenAttention, discarded
from attlas.storage import load_cache, save_cache
from attlas.storage.layer import Chosen
from attlas.storage.low_rank import rotated
from attlas.tasks.compare.perplexity import perplexity, surprise
from attlas.tasks.text import passage

PLAIN = distinct(
    "rotary", "partial-rotary", "key-norm", "windows", "full", lacking=["soft-caps", "sinks"]
)


def texts(count: int = 2, tokens: int = 80) -> list[torch.Tensor]:
    return [tiny_models.prompt(1, tokens, seed=20 + i) for i in range(count)]


def known(model, **options) -> EigenAttention:
    """The part with the model's bases."""
    part = EigenAttention(**options)
    part.calibration = calibrate(model, part, texts())
    return part


@pytest.mark.parametrize("kind", PLAIN)
def test_full_rank_is_full_attention(kind):
    if "full" not in find(kind).traits:
        with pytest.raises(UserError, match="full-attention"):
            known(tiny_models.decoder(kind), keep=1.0).check(tiny_models.decoder(kind))
        return
    model, ids = tiny_models.decoder(kind), tiny_models.prompt(2, 24)
    for options in ({"keep": 1.0}, {"energy": 1.0, "block": 1}, {"rank": 16, "block": 3}):
        part = known(model, **options)
        for way in ({}, {"num_beams": 2}):
            expected = tiny_models.greedy(model, ids, **way)
            with attach(model, part):
                assert tiny_models.greedy(model, ids, **way) == expected


@pytest.mark.parametrize("kind", distinct("rotary"))
def test_bytes_fall_by_the_ratio(kind):
    model, ids = tiny_models.decoder(kind), tiny_models.prompt(2, 24)
    with torch.no_grad(), attach(model) as session:
        model(ids, use_cache=True)
        full = session.kv_bytes
    # Of rotated keys, in the body and of the cache.
    positions = (1 + 1) * 4 * 24 * 2 * 4 if "rotary" in find(kind).traits else 0
    for rank in (4, 11, 16):
        with torch.no_grad(), attach(model, known(model, rank=rank, block=1)) as session:
            model(ids, use_cache=True)
            assert session.kv_bytes == full * rank // 16 + positions
    for keep in (0.3, 0.6, 0.9):
        part = known(model, keep=keep, block=1)
        with torch.no_grad(), attach(model, part) as session:
            model(ids, use_cache=True)
            held = session.kv_bytes - positions
        assert keep - 1 / 128 - 1e-9 <= held / full <= keep  # a direction of a head is 1 of 128
        ranks = {(k.shape[-1], v.shape[-1]) for k, v in part.directions.values()}
        assert len(ranks) > 1  # layers and sides share by their energy


def test_energy_kept_is_the_energy_asked_for():
    model = tiny_models.decoder("llama")
    part = known(model, energy=0.9)
    part.check(model)
    for number, cut in part.directions.items():
        for name, basis in zip(("kq", "v"), cut, strict=True):
            energy, rank = part.statistics[f"{number}.{name}.energy"], basis.shape[-1]
            shares = energy.cumsum(-1) / energy.sum(-1, keepdim=True)
            assert shares[:, rank - 1].min() >= 0.9
            assert rank == 1 or shares[:, rank - 2].min() < 0.9


def test_no_direction_counts_as_empty():
    lost = discarded(torch.tensor([[4.0, 0.0, 0.0], [1.0, 1.0, 0.0]]).double())
    torch.testing.assert_close(lost, torch.tensor([0.5, 0.0, 0.0]).double())
    ranks = EigenAttention(energy=1.0).ranks({"a": lost}, {"a": 2})
    assert ranks == {"a": 3}


class Seen(Part):
    """Keeps a layer's un-rotated queries and keys."""

    def __init__(self, rotary):
        self.rotary, self.q, self.k = rotary, [], []

    def observe(self, call):
        if call.layer == 1:
            q, k = (x.double() for x in (call.q[:, :: call.groups], call.k))
            at = call.positions[:, None]
            self.q.append(rotated(q, self.rotary, at, back=True))
            self.k.append(rotated(k, self.rotary, at, back=True))


def test_the_error_of_the_products_is_within_the_discarded_energy():
    model = tiny_models.decoder("llama")
    part = known(model, rank=6)
    calibrator = part.calibrator()
    calibrator.check(model)
    seen = Seen(calibrator.rotations[1].now())
    with torch.no_grad(), attach(model, seen):
        for ids in texts():
            model(ids, use_cache=False)
    q, k = (torch.cat([x.flatten(0, 2) for x in held]) for held in (seen.q, seen.k))
    part.check(model)
    basis = part.directions[1][0][0].double()
    energy = part.statistics["1.kq.energy"][0]
    torch.testing.assert_close(energy.sum(), q.square().sum() + k.square().sum())
    error = (q @ k.mT - q @ basis @ basis.mT @ k.mT).norm()
    assert 0 < error <= energy[6:].sum() / 2


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", [{}, {"recent": 3, "block": 4}])
def test_padding_changes_nothing(side, options):
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(2, 24)
    part = known(model, keep=0.5, **{"block": 1, **options})
    mask = torch.ones_like(ids)
    mask[0, slice(0, 7) if side == "left" else slice(17, 24)] = 0
    following = tiny_models.prompt(2, 5, seed=9)

    def read(ids, mask, following):
        with torch.no_grad(), attach(model, part):
            cache, found = None, []
            for token in (ids, *following.split(1, dim=1)):
                if cache is not None:
                    mask = torch.cat([mask, torch.ones_like(token)], dim=1)
                positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -token.shape[1] :]
                out = model(
                    token, attention_mask=mask, position_ids=positions, **with_cache(model, cache),
                    use_cache=True,
                )  # fmt: skip
                cache = cache_of(out)
                found.append(out.logits[:, -1])
        return torch.stack(found[1:])

    together = read(ids, mask, following)
    for row in range(2):
        valid = mask[row].bool()
        alone = read(
            ids[row : row + 1, valid], mask[row : row + 1, valid], following[row : row + 1]
        )
        torch.testing.assert_close(together[:, row], alone[:, 0], atol=1e-4, rtol=1e-4)


def test_chunks_and_forks_are_a_prompt_at_once():
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(2, 24)
    part = known(model, keep=0.5, block=2, recent=1)
    with attach(model, part):
        expected = tiny_models.greedy(model, ids)
    with attach(model, part, chunked=True):
        assert tiny_models.greedy(model, ids, prefill_chunk_size=7) == expected
    prompt = prefill(model, ids[:, :20], [part], chunk=8).extend(model, ids[:, 20:])
    token, eos = prompt.logits.argmax(-1)[:, None], torch.tensor([2])  # greedy() ends with none
    for _ in range(2):
        cache, said = prompt.fork(part), [token]
        with torch.no_grad(), attach(model, part):
            for _ in range(9):
                out = model(said[-1], **with_cache(model, cache))
                said.append(out.logits[:, -1].index_fill(-1, eos, -1e9).argmax(-1)[:, None])
        assert torch.cat(said, dim=1).tolist() == expected


def test_after_an_eviction_keys_stand_where_they_stood():
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(2, 24)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    evict = KeyNorm(0.5, skip_layers=())
    part = known(model, keep=1.0, block=1)
    prompt = prefill(model, ids, [evict, (evict, part)], attention_mask=mask)
    plain, ours = prompt.fork(evict), prompt.fork((evict, part))
    for a, b in zip(plain.layers, ours.layers, strict=True):
        assert set(b.bodies) == {"low-rank"}
        there = a.original_positions() >= 0
        assert torch.equal(
            a.original_positions()[there], b.original_positions()[b.original_positions() >= 0]
        )
        for x, y in zip(a.read()[:2], b.read()[:2], strict=True):
            torch.testing.assert_close(
                x[there], y[b.original_positions() >= 0], atol=1e-5, rtol=1e-5
            )
    with attach(model, evict):
        expected = tiny_models.greedy(model, ids, attention_mask=mask)
    with attach(model, evict, part):
        assert tiny_models.greedy(model, ids, attention_mask=mask) == expected


class Everything(Selection):
    """Lists every page, for key heads or for query heads."""

    by_query = False

    def choose(self, state, body, call):
        heads = call.q.shape[1] if self.by_query else call.k.shape[1]
        pages = torch.arange(-(-body.slots // self.page))
        return Chosen(pages.expand(call.q.shape[0], heads, -1), self.page, body.slots)


@pytest.mark.parametrize("by_query", [False, True])
@pytest.mark.parametrize("kind", distinct("rotary"))
def test_a_selection_reads_listed_coordinates(kind, by_query):
    model, ids = tiny_models.decoder(kind), tiny_models.prompt(2, 24)
    part, every = known(model, keep=0.5, block=1), Everything(page=5)
    every.by_query = by_query
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with attach(model, part):
        expected = tiny_models.greedy(model, ids, attention_mask=mask)
    with attach(model, part, every):
        assert tiny_models.greedy(model, ids, attention_mask=mask) == expected


def test_a_stored_cache_goes_on_with_the_same_bases_alone(tmp_path):
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(1, 24)
    part, token = known(model, keep=0.5, block=1), torch.tensor([[7]])
    cache = prefill(model, ids, [part]).fork(part)
    save_cache(cache, tmp_path / "c", model)
    with torch.no_grad(), attach(model, part):
        expected = model(token, **with_cache(model, cache)).logits
        loaded = load_cache(tmp_path / "c", model)
        for step in range(3):  # it grows, too
            out = model(token, **with_cache(model, loaded)).logits
            if not step:
                torch.testing.assert_close(out, expected, atol=0, rtol=0)
        assert {len(layer.bodies) for layer in loaded.layers} == {1}
    others = {"ranks": known(model, keep=0.6, block=1), "calibration": EigenAttention(0.5, block=1)}
    others["calibration"].calibration = calibrate(model, part, texts(1))
    for other in others.values():
        with torch.no_grad(), attach(model, other), pytest.raises(UserError, match="other bases"):
            model(token, **with_cache(model, load_cache(tmp_path / "c", model)))
    with torch.no_grad(), attach(model), pytest.raises(UserError, match="attach"):
        model(token, **with_cache(model, load_cache(tmp_path / "c", model)))


def test_half_precision():
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(2, 24)
    part = known(model, keep=0.7, block=1)
    with torch.no_grad(), attach(model, part):
        exact = model(ids[:, -1:], **with_cache(model, cache_of(model(ids)))).logits
    model = model.bfloat16()
    part.calibration = None
    part.calibration = calibrate(model, part, texts())
    with torch.no_grad(), attach(model, part) as session:
        half = model(ids[:, -1:], **with_cache(model, cache_of(model(ids)))).logits
        assert session.cache.layers[0].bodies["low-rank"].held["k"].tensor.dtype == torch.bfloat16
    assert (half.float() - exact).norm() < 0.1 * exact.norm()


def test_without_rotation_queries_fold_too():
    torch.manual_seed(0)
    q, k, v, o = (torch.randn(32, 32) for _ in range(4))
    bases = [torch.linalg.qr(torch.randn(4, 8, 8)).Q for _ in range(2)]
    x = torch.randn(2, 9, 32)
    full = fold(q, k, v, o, *bases)
    plain = fold(q, k, v, o, *(torch.eye(8).expand(4, 8, 8) for _ in range(2)))
    assert full.q.shape == (32, 32)
    torch.testing.assert_close(full(x), plain(x), atol=1e-3, rtol=1e-3)
    cut = fold(q, k, v, o, bases[0][..., :5], bases[1][..., :3])
    assert (cut.q.shape[0], cut.k.shape[0], cut.v.shape[0], cut.o.shape[1]) == (20, 20, 12, 12)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, "keep="),
        ({"keep": 0.5, "rank": 4}, "keep and rank"),
        ({"keep": 0.0}, "keep"),
        ({"energy": 1.5}, "energy"),
        ({"rank": 0}, "rank"),
        ({"keep": 0.5, "block": 0}, "block"),
        ({"keep": 0.5, "recent": -1}, "recent"),
    ],
)
def test_bad_options(options, names):
    with pytest.raises(ValueError, match=names):
        EigenAttention(**options)


def test_what_the_model_has_not():
    model = tiny_models.decoder("llama")
    for options, names in (({"rank": 17}, "rank=17"), ({"keep": 0.01}, "keep=0.01")):
        with pytest.raises(UserError, match=names), attach(model, known(model, **options)):
            pass
    other = EigenAttention(
        0.5, calibration=known(tiny_models.decoder("qwen3"), keep=0.5).calibration
    )
    with pytest.raises(UserError, match="another model"), attach(model, other):
        pass
    found = calibrate(model, EigenAttention(0.5), texts())
    found = Calibration(found.key, found.model, {}, {})
    with (
        pytest.raises(UserError, match="layer 0"),
        attach(model, EigenAttention(0.5, calibration=found)),
    ):
        pass


def test_eigen_attention_on_smollm2(smollm2):
    """Full rank is exact to 1e-4; at 40 % less cache, perplexity rises less than by random dimensions."""
    model, tokenizer = smollm2
    part = EigenAttention(0.6)
    part.calibration = calibrate(model, part, windows(tokenizer, tokens=2048, length=512))
    ids = tokenizer(passage(random.Random(7), 3000), return_tensors="pt").input_ids[:, :500]
    context, following = ids[:, :400], ids[:, 400:]
    whole = EigenAttention(1.0, calibration=part.calibration, block=1)
    scattered = {}
    for name, t in part.calibration.tensors.items():
        if name.endswith("basis"):  # random dimensions, as many
            chosen = torch.randperm(t.shape[-1], generator=torch.Generator().manual_seed(3))
            t = torch.eye(t.shape[-1], dtype=t.dtype)[:, chosen].expand(t.shape)
        scattered[name] = t
    key, kind = part.calibration.key, part.calibration.model
    pruned = EigenAttention(0.6, calibration=Calibration(key, kind, scattered))
    prompt = prefill(model, context, [part, whole, pruned])
    held = sum(layer.nbytes - 400 * 2 * 4 for layer in prompt.fork(part).layers)  # positions beside
    assert 0.595 < held / sum(layer.keys.nbytes * 2 for layer in prompt.cache.layers) <= 0.6
    found, logits = {}, {}
    for name, one in (("full", None), ("whole", whole), ("eigen", part), ("random", pruned)):
        with torch.no_grad(), attach(model, *([one] if one else [])):
            logits[name] = model(following, **with_cache(model, prompt.fork(one))).logits[0, :-1]
            found[name] = perplexity(surprise(logits[name], following[0, 1:]).tolist()).value
    torch.testing.assert_close(logits["whole"], logits["full"], atol=1e-4, rtol=1e-4)
    assert found["eigen"] < 1.25 * found["full"], found
    assert found["eigen"] - found["full"] < 0.1 * (found["random"] - found["full"]), found
