"""sparsek-attention: what the operator gives, what is chosen, and what a cache holds of it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import attlas
from attlas.layers.sparse import sparsek as module
from attlas.layers.sparse.sparsek import SparseKAttention, sparsek, threshold, thresholds
from attlas.tasks.train.recall import pairs_and_queries


def layer(**options: object) -> SparseKAttention:
    given = {"dim": 32, "heads": 4, "kv_heads": 2, "keep": 5, "window": 4, **options}
    torch.manual_seed(0)
    made = attlas.make("sparsek-attention", **given).double().eval()
    with torch.no_grad():
        made.scorer.weight.mul_(3.0)
    return made


def nearest(z: Tensor, k: int) -> Tensor:
    """argmin ‖p − z‖² under 0 ≤ p ≤ 1, Σ p = k, by trying which bounds hold with equality."""
    best, found = torch.inf, z
    for bounds in itertools.product((0.0, 1.0, None), repeat=len(z)):
        free = torch.tensor([b is None for b in bounds])
        p = torch.tensor([0.0 if b is None else b for b in bounds], dtype=z.dtype)
        if free.any():
            p[free] = z[free] + (k - p.sum() - z[free].sum()) / free.sum()
        elif p.sum() != k:
            continue
        feasible = (p >= 0).all() and (p <= 1).all()
        if feasible and (far := float((p - z).square().sum())) < best:
            best, found = far, p
    return found


# The operator matches a quadratic-programming solve to 1e-6 with correct gradients ----------------------


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("k", [1, 2, 4, 6])
def test_sparsek_attention_operator_is_the_solution_of_its_quadratic_program(seed: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(7, dtype=torch.float64, generator=generator) * [0.1, 0.5, 1.0, 1.0, 2.0, 5.0][seed]
    torch.testing.assert_close(sparsek(z, k), nearest(z, k), rtol=0, atol=1e-6)


@pytest.mark.parametrize("k", [1, 16, 63])
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
def test_sparsek_attention_operator_meets_the_conditions_of_optimality(k: int, spread: float) -> None:
    """Feasible, and z − p is one multiplier wherever no bound holds, smaller at 0 and larger at 1."""
    z = torch.randn(50, 64, dtype=torch.float64) * spread + 7
    p, (tau, kth) = sparsek(z, k), threshold(z, k)
    assert p.min() >= 0
    assert p.max() <= 1
    torch.testing.assert_close(p.sum(-1), torch.full((50,), float(k), dtype=torch.float64))
    gap = z - p - tau[:, None]
    assert gap[(p > 0) & (p < 1)].abs().max() < 1e-9 if ((p > 0) & (p < 1)).any() else True
    assert (gap[p == 0] <= 1e-9).all()
    assert (gap[p == 1] >= -1e-9).all()
    assert torch.equal(kth, z.sort(-1, descending=True).values[:, k - 1])


def test_sparsek_attention_operator_with_ties_and_few_numbers() -> None:
    torch.testing.assert_close(sparsek(torch.zeros(8), 3), torch.full((8,), 3 / 8))
    assert torch.equal(sparsek(torch.randn(5), 5), torch.ones(5))
    z = torch.tensor([1.0, -torch.inf, 4.0, -torch.inf])
    assert sparsek(z, 2).tolist() == [1.0, 0.0, 1.0, 0.0]
    assert sparsek(z, 1).tolist() == [0.0, 0.0, 1.0, 0.0]
    assert sparsek(torch.tensor([9.0, 5.0, 0.0]), 2).tolist() == [1.0, 1.0, 0.0]
    with pytest.raises(ValueError, match="k must"):
        sparsek(z, 0)


def test_sparsek_attention_jacobian_is_exact() -> None:
    """I − 11ᵀ/|S| over the keys strictly between the bounds, and finite differences."""
    z = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    p = sparsek(z, 4)
    inner = ((p > 0) & (p < 1)).double()
    assert 2 < inner.sum() < 12
    wanted = torch.diag(inner) - torch.outer(inner, inner) / inner.sum()
    torch.testing.assert_close(torch.autograd.functional.jacobian(lambda x: sparsek(x, 4), z), wanted)
    assert torch.autograd.gradcheck(lambda x: sparsek(x, 4), z.clone().requires_grad_())


# k equal to the length gives full attention -------------------------------------------------------------


@pytest.mark.parametrize("options", [{"keep": 40, "window": 1}, {"keep": 30, "window": 10}])
def test_sparsek_attention_with_all_keys_is_full_attention(options: dict[str, int]) -> None:
    mixer, x = layer(position="rope", **options), torch.randn(2, 40, 32, dtype=torch.float64)
    plain = attlas.Attention(32, 4, kv_heads=2, causal=True, position="rope").double()
    plain.load_state_dict(mixer.state_dict(), strict=False)
    torch.testing.assert_close(mixer(x), plain(x), rtol=0, atol=1e-9)


# Incremental and batch selections agree -----------------------------------------------------------------


def by_definition(mixer: SparseKAttention, x: Tensor, valid: Tensor) -> Tensor:
    """The output, query by query, of every prefix by itself."""
    q, k, v, _ = mixer.prepare(x, mask=valid)
    scores = mixer.scorer(x).transpose(1, 2) + mixer.slope * torch.arange(x.shape[1])
    heads = torch.zeros_like(q)
    for row, head, at in itertools.product(range(len(x)), range(mixer.heads), range(x.shape[1])):
        own, there = head // 2, valid[row].nonzero()[:, 0]
        near = there[(there <= at) & (there > at - mixer.window)]
        far = there[there <= at - mixer.window]
        p = sparsek(scores[row, own, far], mixer.keep)
        best = p.topk(min(mixer.keep, len(far))).indices
        seen = torch.cat((near, far[best]))
        if valid[row, at]:
            weights = (k[row, own, seen] @ q[row, head, at] * mixer.scale).softmax(-1)
            weights = weights * torch.cat((torch.ones(len(near)), p[best]))
            heads[row, head, at] = weights @ v[row, own, seen]
    return mixer.o_proj(heads.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("options", [{}, {"keep": 1, "window": 1}, {"slope": 0.0}, {"slope": 0.5}])
def test_sparsek_attention_is_its_definition(options: dict[str, float], monkeypatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 16)
    mixer, x = layer(**options), torch.randn(2, 40, 32, dtype=torch.float64)
    valid = torch.ones(2, 40, dtype=torch.bool)
    valid[1, :7], valid[0, 36:] = False, False
    wanted = by_definition(mixer, x, valid)
    torch.testing.assert_close(mixer(x, mask=valid)[valid], wanted[valid])
    q, k, v, inputs = mixer.prepare(x, mask=valid)
    staged = mixer.aggregate(mixer.weigh(q, k, inputs), v, inputs)
    torch.testing.assert_close(mixer.output(staged, inputs)[valid], wanted[valid])


@pytest.mark.parametrize("sizes", [[1] * 50, [20, 30], [7, 1, 1, 40, 1]])
def test_sparsek_attention_selects_incrementally_as_in_one_batch(sizes: list[int], monkeypatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 8)
    u = torch.randn(2, 3, 50, dtype=torch.float64)
    rank = torch.arange(50).expand(2, 3, -1) + 4
    tau, least, _ = thresholds(u, rank, 6, 50, None)
    pool, seen, parts = None, 0, []
    for size in sizes:
        seen += size
        *both, pool = thresholds(u[..., :seen], rank[..., :seen] - (seen - size), 6, size, pool)
        assert pool.shape[-1] < 6 + 20
        parts.append(both)
    for whole, part in zip((tau, least), zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(part, dim=-1), whole)
    for t in range(50):  # and as every prefix by itself
        alone = threshold(u[..., : max(0, t + 1 - 4)], 6)
        for whole, part in zip((tau, least), alone, strict=True):
            torch.testing.assert_close(whole[..., t], part)
    assert (tau.diff() > -1e-12)[tau[..., 1:] > -torch.inf].all()  # what is left out never comes back


# Generation keeps a constant-size cache -----------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[30] + [1] * 50, [1] * 80, [25, 40, 15]])
@pytest.mark.parametrize("padded", [False, True])
def test_sparsek_attention_decodes_with_a_cache_of_constant_size(sizes: list[int], padded: bool) -> None:
    mixer, x = layer(position="rope"), torch.randn(2, 80, 32, dtype=torch.float64)
    valid = torch.ones(2, 80, dtype=torch.bool)
    valid[0, :7] = not padded
    at_once = mixer(x, mask=valid)
    cache, seen, parts = mixer.init_cache(), 0, []
    for part in x.split(sizes, dim=1):
        seen += part.shape[1]
        parts.append(mixer(part, mask=valid[:, :seen] if padded else None, cache=cache))
        held = cache.layers[0]
        assert held.keys.shape[2] <= 5 + 4
        assert held.states["pool"].shape[-1] <= 5 + 20
    torch.testing.assert_close(torch.cat(parts, dim=1)[valid], at_once[valid], rtol=0, atol=1e-9)
    assert cache.get_seq_length() == 80


def test_sparsek_attention_numbers_beside_the_cache_do_not_grow_with_the_text() -> None:
    """However alike scores are: the slope parts them."""
    mixer, x = layer(slope=0.1), torch.randn(1, 400, 32, dtype=torch.float64)
    with torch.no_grad():
        mixer.scorer.weight.mul_(1e-6)
    cache, sizes = mixer.init_cache(), []
    for part in x.split(100, dim=1):
        mixer(part, cache=cache)
        sizes.append(cache.layers[0].states["pool"].shape[-1])
    assert max(sizes) <= 5 + 1 + 1 / 0.1
    assert cache.layers[0].keys.shape[2] == 9


def test_sparsek_attention_with_a_bias_of_distances_drops_nothing() -> None:
    mixer, x = layer(position="alibi"), torch.randn(1, 30, 32, dtype=torch.float64)
    cache = mixer.init_cache()
    parts = [mixer(part, cache=cache) for part in x.split([20] + [1] * 10, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), mixer(x))
    assert cache.layers[0].keys.shape[2] == 30


# Gradients, cost, refusals ------------------------------------------------------------------------------


def test_sparsek_attention_scorer_learns_through_values_and_keys(monkeypatch) -> None:
    """As if keys had been p k, whose values they keep; in blocks and by stages alike."""
    mixer, x = layer(), torch.randn(2, 40, 32, dtype=torch.float64)
    weight = torch.randn_like(x)
    (mixer(x) * weight).sum().backward()
    found = mixer.scorer.weight.grad.clone()
    mixer.zero_grad()
    q, k, v, inputs = mixer.prepare(x)
    u, columns = inputs.notes["u"], torch.arange(40)
    p = (u[:, :, None] - inputs.notes["tau"][..., None]).clamp(0, 1)
    p = torch.where(columns > columns[:, None] - 4, 1.0, p).repeat_interleave(2, 1)
    keys, values = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    straight = keys[:, :, None] * (1 + p - p.detach())[..., None]
    scores = torch.einsum("bhqd,bhqkd->bhqk", q, straight) * mixer.scale
    weights = scores.masked_fill(~inputs.visible(q, k), -torch.inf).softmax(-1)
    (mixer.output(weights * p @ values, inputs) * weight).sum().backward()
    torch.testing.assert_close(found, mixer.scorer.weight.grad)
    monkeypatch.setattr(module, "BLOCK", 16)
    mixer.zero_grad()
    (mixer(x) * weight).sum().backward()
    torch.testing.assert_close(found, mixer.scorer.weight.grad)


def test_sparsek_attention_looks_at_few_pairs(monkeypatch) -> None:
    mixer = attlas.make("sparsek", dim=16, heads=2, keep=128, window=128).eval()
    met: list[int] = []
    real = SparseKAttention._block

    def counted(self, q, k, *rest):
        met.append(q.shape[2] * k.shape[2])
        return real(self, q, k, *rest)

    monkeypatch.setattr(SparseKAttention, "_block", counted)
    with torch.no_grad():
        mixer(torch.randn(1, 4096, 16))
    assert sum(met) <= 4096 * (128 + 128 + module.BLOCK)


def test_sparsek_attention_learns_which_tokens_to_keep() -> None:
    """Multi-query associative recall, four pairs among 32 tokens: with a window of two and eight kept
    tokens, the scorer must find the pairs."""
    torch.manual_seed(0)
    model, rng = _Model(9), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(150):
        batch = pairs_and_queries(rng, 48, 4, 4, 32)
        loss = cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["targets"].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    held_out = pairs_and_queries(torch.Generator().manual_seed(1), 512, 4, 4, 32)
    asked = held_out["targets"] >= 0
    with torch.no_grad():
        right = model(held_out["input_ids"]).argmax(-1)[asked] == held_out["targets"][asked]
    assert right.float().mean() > 0.95


class _Model(torch.nn.Module):
    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(tokens, 64)
        self.layers = torch.nn.ModuleList(
            attlas.make("sparsek", dim=64, heads=2, position="rope", keep=8, window=2) for _ in range(2)
        )
        self.norms = torch.nn.ModuleList(torch.nn.RMSNorm(64) for _ in range(3))
        self.head = torch.nn.Linear(64, tokens)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for norm, mixer in zip(self.norms, self.layers, strict=False):
            x = x + mixer(norm(x))
        return self.head(self.norms[2](x))


def test_sparsek_attention_refuses_other_masks_and_bidirectional_use() -> None:
    x = torch.randn(1, 8, 32, dtype=torch.float64)
    with pytest.raises(ValueError, match="mask"):
        layer()(x, mask=attlas.masks.window(3))
    with pytest.raises(ValueError, match="causal"):
        layer(causal=False)
    for name in ("keep", "window"):
        with pytest.raises(ValueError, match=name):
            layer(**{name: 0})
    with pytest.raises(ValueError, match="slope"):
        layer(slope=-1.0)
