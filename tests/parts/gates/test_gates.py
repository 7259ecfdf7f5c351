"""Filters, balanced walks and gated heads: exact where all is kept, blind to padding, of true size."""

import pytest
import torch
from transformers import DynamicCache

import tiny_models
from attlas.attach import Part, attach
from attlas.cache.duo_gates import Gated, passkeys
from attlas.cache.prompt import prefill
from attlas.calibration import Calibration, calibrate
from attlas.contract.families import distinct, find
from attlas.contract.parts import small_llama
from attlas.errors import UserError
from attlas.hf.caches import cache_of, with_cache
from attlas.ops.reference import reference
from attlas.parts.evict.balance_kv import BalanceKV
from attlas.parts.evict.duo_attention import DuoAttention
from attlas.parts.evict.q_filters import QFilters
from attlas.storage import load_cache, save_cache
from attlas.storage.files import fingerprint

KINDS = distinct("windows", "sinks", "partial-rotary", having=["full", "rotary"])


def texts(count=3, tokens=40):
    return [tiny_models.prompt(1, tokens, seed=20 + i) for i in range(count)]


def q_filters(model, **options):
    if "calibration" not in options:
        options["calibration"] = calibrate(model, QFilters(0.5), texts())
    return QFilters(**{"keep": 0.6, "recent": 4, **options})


def balance(model, **options):
    return BalanceKV(**{"keep": 0.5, "sinks": 2, "recent": 4, "block": 4, "gamma": 0.3, **options})


def shape(model):
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return config.num_hidden_layers, heads


def duo(model, **options):
    gates = torch.rand(shape(model), generator=torch.Generator().manual_seed(3))
    given = {"pattern": gates, "sinks": 2, "recent": 5, "block": 3, **options}
    return DuoAttention(given.pop("sparsity", 0.5), **given)


PARTS = {
    "q-filters": q_filters,
    "q-filters-while": lambda model: q_filters(model, while_decoding=True),
    "balancekv": balance,
    "balancekv-quarter": lambda model: balance(model, keep=0.25),
    "balancekv-while": lambda model: balance(model, while_decoding=True, block=2),
    "duo-attention": duo,
}
every_part = pytest.mark.parametrize("make", PARTS.values(), ids=PARTS)


def logits_after(model, part, ids, padding="none", length=None, steps=9, chunk=None):
    """Logits of fixed later tokens, with the context in one row of a padded batch of two."""
    later = tiny_models.prompt(1, steps, seed=9)
    mask = torch.ones_like(ids)
    if padding != "none":
        gap = torch.full((1, length - ids.shape[1]), 5)
        row, valid = [gap, ids], [torch.zeros_like(gap), mask]
        if padding == "right":
            row, valid = row[::-1], valid[::-1]
        other = tiny_models.prompt(1, length, seed=4)
        ids = torch.cat([torch.cat(row, dim=1), other])
        mask = torch.cat([torch.cat(valid, dim=1), torch.ones_like(other)])
    found = []
    with torch.no_grad(), attach(model, part, chunked=chunk is not None):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache(config=model.config)
        size = chunk or ids.shape[1]
        for start in range(0, ids.shape[1], size):
            some = slice(start, start + size)
            model(
                ids[:, some], **with_cache(model, cache), position_ids=positions[:, some],
                attention_mask=mask[:, : some.stop],
            )  # fmt: skip
        for token in later[0]:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            out = model(
                token.expand(len(mask), 1), **with_cache(model, cache), attention_mask=mask,
                position_ids=mask.sum(-1, keepdim=True) - 1,
            )  # fmt: skip
            found.append(out.logits[0, -1])
    return torch.stack(found)


def close(a, b):
    torch.testing.assert_close(a, b, atol=3e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@every_part
def test_padding_and_chunks_do_not_count(kind, make):
    model, ids = tiny_models.decoder(kind), tiny_models.prompt(1, 22)
    part = make(model)
    alone = logits_after(model, part, ids)
    assert not torch.allclose(alone, logits_after(model, balance(model, keep=1.0), ids), atol=1e-3)
    for side in ("left",) if "windows" in find(kind).traits else ("left", "right"):
        close(logits_after(model, part, ids, side, length=31), alone)
    close(logits_after(model, part, ids, chunk=5), alone)


def test_short_rows_keep_their_own_time():
    """A row too short to be reduced with the prompt is reduced later as if it were alone."""
    model = tiny_models.decoder("llama")
    for tokens in (3, 8, 11):
        ids = tiny_models.prompt(1, tokens)
        for part in (duo(model), balance(model, while_decoding=True, block=2)):
            alone = logits_after(model, part, ids, steps=20)
            close(logits_after(model, part, ids, "left", length=30, steps=20), alone)


@pytest.mark.parametrize("kind", distinct("windows", having=["full"]))
def test_everything_kept_is_full_attention(kind):
    model, ids = tiny_models.decoder(kind), tiny_models.prompt(2, 24)
    plain = tiny_models.greedy(model, ids)
    ones = {"keep": 1.0}
    for part in (q_filters(model, **ones), balance(model, **ones), duo(model, sparsity=0.0)):
        with attach(model, part) as session:
            assert tiny_models.greedy(model, ids) == plain
            known = [x for x in session.cache.layers if part.name in getattr(x, "learned", {})]
            assert all(layer.original_positions() is None for layer in known)


@every_part
def test_beams_rows_and_stored_caches(make, tmp_path):
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(2, 30)
    part = make(model)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    with attach(model, part):
        both = tiny_models.greedy(model, ids, 8, attention_mask=mask, num_beams=3)
        first = tiny_models.greedy(model, ids[:1, 9:], 8, num_beams=3)
        assert both == first + tiny_models.greedy(model, ids[1:], 8, num_beams=3)
    read = prefill(model, ids, [part])
    cache = read.fork(part)
    save_cache(cache, tmp_path / "cache", model)
    stored = load_cache(tmp_path / "cache", model)
    later = tiny_models.prompt(2, 12, seed=8)
    with torch.no_grad(), attach(model, part):
        once, again, direct = (
            torch.cat(
                [model(t, **with_cache(model, c)).logits for t in later.split(1, dim=1)], dim=1
            )
            for c in (cache, stored, cache_of(model(ids)))
        )
    close(once, again)
    close(once, direct)


@pytest.mark.parametrize("kind", distinct("soft-caps", "sinks"))
def test_weights_count_however_the_cache_is_read(kind):
    """By a question at once, token by token, and with a recorder that looks at every weight."""
    model, ids = tiny_models.decoder(kind), tiny_models.prompt(2, 40)
    question = tiny_models.prompt(2, 36, seed=6)
    part, found = balance(model, keep=0.25), []
    with torch.no_grad():
        for size, record in ((36, []), (1, []), (6, []), (1, ["entropy"])):
            with attach(model, part, record=record):
                cache = cache_of(model(ids))
                found.append(torch.cat(
                    [model(t, **with_cache(model, cache)).logits for t in question.split(size, dim=1)],
                    dim=1,
                ))  # fmt: skip
    for other in found[1:]:
        close(other, found[0])


def held_by(model, part, ids):
    with torch.no_grad(), attach(model, part) as session:
        cache = cache_of(model(ids))
    return cache, session


def test_balanced_body_is_weighted_attention():
    """The body holds sinks as they are and half of the rest, whose weights stand for all of it."""
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(1, 30)
    part = balance(model, keep=0.25)
    cache, _ = held_by(model, part, ids)
    whole = prefill(model, ids).cache
    for held, full in zip(cache.layers, whole.layers, strict=True):
        columns, weights = held.original_positions(), held.biases().exp()
        assert columns.shape[-1] == 2 + 24 // 4 + 4
        assert columns[0, :, :2].tolist() == [[0, 1]] * 2
        assert columns[0, :, -4:].tolist() == [[26, 27, 28, 29]] * 2
        chosen = weights.gather(-1, columns[..., :8].long())
        torch.testing.assert_close(chosen[..., 2:].sum(-1), torch.full((1, 2), 24.0))
        torch.testing.assert_close(chosen[..., :2], torch.ones(1, 2, 2))
        q = torch.randn(1, 4, 1, 16)
        at = columns.long()
        k, v = (x.gather(2, at[..., None].expand(-1, -1, -1, 16)) for x in (full.keys, full.values))
        bias = weights.gather(-1, at).log().repeat_interleave(2, dim=1)
        expected, _ = reference(
            q, k, v, scale=0.25, score_mod=lambda s, b, h, i, j, w=bias: s + w[b, h, j]
        )
        torch.testing.assert_close(held.attend(q, scale=0.25), expected)


def test_bytes():
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(2, 64)
    layers, heads, width = 4, 2, 16
    cache, session = held_by(model, balance(model), ids)
    body, dense = 2 + (64 - 6) // 2, 4
    slot = 2 * width * 4
    assert session.kv_bytes == 2 * layers * heads * (body * (slot + 8) + dense * slot)
    assert session.read_bytes <= session.kv_bytes
    pattern = torch.zeros(4, 2)
    pattern[:, 0] = 1
    sizes = []
    for tokens in (40, 80):
        part = duo(model, pattern=pattern)
        cache, session = held_by(model, part, tiny_models.prompt(2, tokens))
        sizes.append(session.kv_bytes)
        for layer in cache.layers:
            assert layer.bodies["heads"].lengths.tolist() == [[tokens - 5, 2]] * 2
    assert sizes[1] - sizes[0] == 2 * layers * 40 * (slot + 4)  # of the retrieval heads alone


@pytest.mark.parametrize("streams", ["some", "all"])
def test_duo_attention_streaming_heads_stay_constant_while_decoding(streams):
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(2, 30)
    pattern = torch.zeros(4, 2)
    pattern[:, 1] = 1
    sparsity = 0.5 if streams == "some" else 1.0
    part = duo(model, pattern=pattern, sparsity=sparsity)
    held = []
    with torch.no_grad(), attach(model, part) as session:
        cache = cache_of(model(ids))
        for token in tiny_models.prompt(2, 30, seed=7).split(1, dim=1):
            model(token, **with_cache(model, cache))
            columns = cache.layers[2].original_positions()
            count = (columns >= 0).sum(-1)
            now = cache.get_seq_length()
            assert count[:, 0].max() <= 2 + 5 + 2
            assert set(columns[0, 0].tolist()) >= {0, 1, *range(now - 5, now)}
            if streams == "some":
                assert columns[1, 1].tolist() == list(range(now))
            held.append(session.kv_bytes)
    if streams == "all":
        assert held[-1] <= max(held[:4])


class Hide(Part):
    """Hides from a whole cache what streaming heads forget of a context."""

    def __init__(self, part, context):
        self.part, self.context = part, context

    def mask(self, call):
        at = torch.arange(call.k.shape[2])
        seen = (at < self.part.sinks) | (at >= self.context - self.part.recent)
        shown = self.part.retrieves[call.layer][:, None] | seen
        return (
            shown.repeat_interleave(call.groups, dim=0)[None, :, None]
            if call.forward_pass.offset
            else None
        )


def test_dropping_equals_hiding():
    """Streaming heads attend as if the mask hid what they forgot."""
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(2, 24)
    question, part = tiny_models.prompt(2, 3, seed=5), duo(model)
    with torch.no_grad():
        with attach(model, part):
            cache = cache_of(model(ids))
            dropped = model(question, **with_cache(model, cache)).logits
        with attach(model, Hide(part, 24)):
            whole = cache_of(model(ids))
            close(dropped, model(question, **with_cache(model, whole)).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@every_part
def test_other_precisions(dtype, make):
    model = tiny_models.decoder("llama").to(dtype)
    part = make(model)
    with attach(model, part) as session:
        assert len(tiny_models.greedy(model, tiny_models.prompt(2, 24), 8)[0]) == 8
    assert session.cache.layers[0].keys.dtype == dtype


# Calibration ---------------------------------------------------------------------------------------


def test_q_filters_are_svd_and_gone_on_with(tmp_path):
    """The running sums give what an SVD of all queries gives, interrupted or not, padded or not."""
    model, read = tiny_models.decoder("llama"), texts()
    part = QFilters(0.5)
    whole = calibrate(model, part, read)
    queries = []

    class Collect(type(part.calibrator())):
        def observe(self, call):
            if call.layer == 2:
                queries.append(call.q[0])
            super().observe(call)

    part.calibrator = Collect
    calibrate(model, part, read)
    stacked = torch.cat(queries, dim=1).double()
    u, _, vh = torch.linalg.svd(stacked, full_matrices=False)
    sign = ((u[..., 0] > 0).double().mean(-1) > 0.5).double() * 2 - 1
    expected = -(sign[:, None] * vh[:, 0]).view(2, 2, -1).mean(1)
    torch.testing.assert_close(whole.tensors["2.filter"].double(), expected, atol=1e-5, rtol=1e-4)

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    partial = tmp_path / "partial"
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, QFilters(0.5), read, partial=partial, tick=stop)
    rest = calibrate(model, QFilters(0.5), read, partial=partial)
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(rest.tensors[name], tensor)


def test_a_long_text_leaves_a_sample():
    from attlas.parts.evict.q_filters import SAMPLES, QueryDirections

    calibrator, model = QueryDirections(), tiny_models.decoder("llama")
    with torch.no_grad(), attach(model, calibrator):
        for ids in texts(4, SAMPLES // 3):
            model(ids, use_cache=False)
    assert calibrator.sums["1.sample"].shape == (SAMPLES, 2, 2, 16)
    assert int(calibrator.sums["1.count"]) == 4 * (SAMPLES // 3)
    assert calibrator.tensors()["1.filter"].shape == (2, 16)


def test_gates_are_fitted_and_gone_on_with(tmp_path):
    model = small_llama(torch.float32)
    read = [torch.randint(2, 64, (1, 96)) for _ in range(2)]
    before = {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    whole = calibrate(model, DuoAttention(steps=4), read)
    gates = whole.tensors["gates"]
    assert gates.shape == (6, 2)
    assert 0 <= gates.min() < gates.max() <= 1
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name][0])
        assert weight.requires_grad == before[name][1]
        assert weight.grad is None

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    partial = tmp_path / "partial"
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, DuoAttention(steps=4), read, partial=partial, tick=stop)
    ticks = []
    rest = calibrate(
        model, DuoAttention(steps=4), read, partial=partial,
        tick=lambda done, total: ticks.append((done, total)),
    )  # fmt: skip
    assert ticks == [(2, 4), (3, 4), (4, 4)]
    torch.testing.assert_close(rest.tensors["gates"], gates)
    part = DuoAttention(sinks=2, recent=4, calibration=whole)
    with attach(model, part):
        assert sum(int(heads.sum()) for heads in part.retrieves.values()) == 6


def test_duo_attention_gates_of_one_are_the_model_and_learn_which_head_retrieves():
    """α = 1 everywhere reproduces the model; a head whose output is thrown away gets a small gate."""
    model = small_llama(torch.float32)
    ids = torch.randint(2, 64, (1, 64))
    with torch.no_grad():
        plain = model(ids).logits
        with attach(model, Gated(torch.ones(6, 2), range(6), 2, 8)):
            close(model(ids).logits, plain)
        with attach(model, Gated(torch.zeros(6, 2), range(6), 2, 8)):
            assert not torch.allclose(model(ids).logits, plain, atol=1e-2)
        for layer in model.model.layers:  # query heads 2 and 3 read key head 1
            layer.self_attn.o_proj.weight[:, 16:] = 0
            layer.self_attn.o_proj.weight[:, :16] *= 4
    read = [torch.randint(2, 64, (1, 128)) for _ in range(2)]
    gates = calibrate(model, DuoAttention(steps=25), read).tensors["gates"]
    assert (gates[:, 0].mean() - gates[:, 1].mean()) > 0.1


def test_passkeys():
    import random

    text = list(range(1000, 1512))
    ids, asked = passkeys(text, [1, 2, 3], random.Random(0))
    assert ids.shape == asked.shape == (1, 512)
    question = ids[asked].tolist()
    assert len(question) == 4 * (2 + 8)
    rest = ids[~asked].tolist()
    assert [n for n in rest if n < 1000] == question  # hidden once each, in the order asked
    assert [n for n in rest if n >= 1000] == text[: 512 - 80]


# What is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.75, 1.5, -1.0])
def test_balance_takes_powers_of_a_half(keep):
    with pytest.raises(UserError, match="power of a half"):
        BalanceKV(keep)


def test_refusals(tmp_path):
    model = tiny_models.decoder("llama")
    for name, options in {
        "sinks": {"sinks": -1}, "recent": {"recent": -1}, "block": {"block": 1},
        "gamma": {"gamma": -0.1},
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=name):
            BalanceKV(0.5, **options)
    for name, options in {
        "sparsity": {"sparsity": 1.2}, "recent": {"recent": 0}, "block": {"block": 0},
        "steps": {"steps": 0}, "sinks": {"sinks": -2}, "pattern": {"pattern": torch.ones(3)},
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=name):
            DuoAttention(**options)
    with pytest.raises(UserError, match="not both"):
        DuoAttention(pattern=torch.ones(4, 2), calibration="x")
    with (
        pytest.raises(UserError, match="layers and heads"),
        attach(model, duo(model, pattern=torch.ones(4, 3))),
    ):
        pass
    with pytest.raises(UserError, match="recent"):
        QFilters(0.5, recent=-1)
    with pytest.raises(UserError, match="recent=20"), attach(model, q_filters(model, recent=20)):
        model(tiny_models.prompt())
    other = calibrate(tiny_models.decoder("qwen3"), QFilters(0.5), texts())
    with (
        pytest.raises(UserError, match="another model"),
        attach(model, QFilters(0.5, calibration=other)),
    ):
        pass
    short = Calibration("q-filters", fingerprint(model), {"0.filter": torch.ones(2, 16)})
    with (
        pytest.raises(UserError, match="no filter for layer 1"),
        attach(model, QFilters(0.5, calibration=short)),
    ):
        pass
    with pytest.raises(UserError, match="at least 24 tokens"):
        calibrate(model, DuoAttention(), texts(1, 20))
    with pytest.raises(UserError, match="sink logits"):
        calibrate(tiny_models.decoder("gpt-oss"), DuoAttention(), texts())


def test_patterns_from_files(tmp_path):
    from safetensors.torch import save_file

    gates = torch.tensor([[0.1, 0.9], [1.0, 0.2], [0.3, 0.3], [0.0, 0.5]])
    (tmp_path / "heads.tsv").write_text("\n".join("\t".join(map(str, r)) for r in gates.tolist()))
    save_file({"gates": gates}, tmp_path / "heads.safetensors")
    for name in ("heads.tsv", "heads.safetensors"):
        torch.testing.assert_close(DuoAttention(pattern=tmp_path / name).given, gates)
    with pytest.raises(UserError, match="there is no pattern"):
        DuoAttention(pattern=tmp_path / "none.tsv")
    (tmp_path / "bad.tsv").write_text("1\t2\n3\n")
    with pytest.raises(UserError, match="cannot be read"):
        DuoAttention(pattern=str(tmp_path / "bad.tsv"))
    model, part = tiny_models.decoder("llama"), DuoAttention(pattern=gates, sparsity=0.5)
    with attach(model, part):
        found = torch.stack(list(part.retrieves.values()))
    assert found.tolist() == [[False, True], [True, False], [False, True], [False, True]]
