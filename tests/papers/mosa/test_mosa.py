"""mosa: what heads choose, what they cost, and what is left of dense attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attlas
from attlas import masks
from attlas.layers.sparse import mosa
from attlas.positions import RoPE

X = torch.randn(2, 24, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _layer(**options):
    torch.manual_seed(0)
    options = {"dim": 16, "heads": 4, "dense_heads": 1, "sparsity": 4, "causal": True, **options}
    return attlas.make("mosa", **options).double().eval()


def _by_definition(layer, x: Tensor, valid: Tensor | None = None) -> Tensor:
    """Head by head of one text, over the tokens that it chooses."""
    places = torch.arange(len(x)) if valid is None else valid.nonzero()[:, 0]
    text, y = x[places], torch.zeros_like(x)
    rotary = RoPE(layer.rotated, layer.rope_base) if layer.rotated else None
    r = layer.router(text).sigmoid()
    for head in range(layer.heads):
        rows = slice(head * layer.head_dim, (head + 1) * layer.head_dim)
        at, gate = torch.arange(len(text)), torch.ones(len(text)).double()
        sparse = head - layer.dense_heads
        if sparse >= 0:
            k = min(max(len(text) // layer.sparsity, 2), len(text))
            ranked = r[:, sparse].argsort(descending=True).tolist()
            if layer.include_first:
                ranked = [0, *(t for t in ranked if t)]
            at = torch.tensor(sorted(ranked[:k]))
            gate = r[at, sparse]
        q, k, v = (text[at] @ p.weight[rows].T for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        if rotary is not None:
            n = layer.rotated
            q, k = (
                torch.cat((rotary.rotate(t[None, None, :, :n], at)[0, 0], t[:, n:]), -1) for t in (q, k)
            )
        scores = q @ k.T * layer.head_dim**-0.5
        if layer.causal:
            scores = scores.masked_fill(at[:, None] < at, -torch.inf)
        own = gate[:, None] * (scores.softmax(-1) @ v)
        y[places[at]] += own @ layer.o_proj.weight[:, rows].T
    return y


@pytest.mark.parametrize("options", [
    {}, {"causal": False}, {"dense_heads": 0}, {"include_first": True}, {"sparsity": 1}, {"sparsity": 99},
    {"rotate_fraction": 1.0}, {"rotate_fraction": 0.0, "causal": False, "include_first": True},
])  # fmt: skip
def test_mosa_is_its_definition(options: dict) -> None:
    layer = _layer(**options)
    torch.testing.assert_close(layer(X), torch.stack([_by_definition(layer, x) for x in X]))
    valid = torch.ones(2, 24, dtype=torch.bool)
    valid[0, :9], valid[1, 20:], valid[1, 5] = False, False, False
    wanted = [_by_definition(layer, x, own) for x, own in zip(X, valid, strict=True)]
    torch.testing.assert_close(layer(X, mask=valid)[valid], torch.stack(wanted)[valid])
    pairs = torch.ones(1, 1, 24, 24, dtype=torch.bool)  # another way, over all pairs
    torch.testing.assert_close(layer(X, mask=pairs), layer(X))
    window = layer(X, mask=masks.window(5))
    torch.testing.assert_close(window, layer(X, mask=masks.dense(masks.window(5), 24, 24)))


def test_mosa_with_all_tokens_and_router_one_is_multi_head_attention() -> None:
    """σ of 1000 is 1."""
    x = torch.cat((torch.full_like(X[..., :1], 1000.0), X[..., 1:]), dim=-1)
    for causal in (True, False):
        layer = _layer(sparsity=1, causal=causal, rotate_fraction=1.0)
        with torch.no_grad():
            layer.router.weight.zero_()[:, 0] = 1.0
        plain = attlas.make("softmax", dim=16, heads=4, causal=causal, position="rope").double()
        plain.load_state_dict(layer.state_dict(), strict=False)
        torch.testing.assert_close(layer(x), plain(x), atol=1e-5, rtol=0)


def test_mosa_score_cost_of_a_sparse_head_falls_with_the_square(monkeypatch) -> None:
    """k² of T² pairs, and k of T projections."""
    met: list[tuple[int, int, int]] = []
    real = mosa.ops.attend

    def counted(q, k, v, **options):
        met.append((q.shape[1], q.shape[2], k.shape[2]))
        return real(q, k, v, **options)

    monkeypatch.setattr(mosa.ops, "attend", counted)
    x = torch.randn(1, 512, 16).double()
    for sparsity in (2, 8, 32):
        met.clear()
        layer = _layer(sparsity=sparsity)
        layer(x)
        k = 512 // sparsity
        assert met == [(3, k, k), (1, 512, 512)]
        q, *_, inputs = layer.prepare(x)
        assert (q[:, 1:].abs().sum(-1) > 0).sum(-1).unique().tolist() == [k]
        seen = inputs.visible(q, q)
        assert seen[:, 1:].sum((-1, -2)).unique().tolist() == [k * (k + 1) // 2]


def test_mosa_step_is_the_last_token_of_a_whole_pass() -> None:
    """Behind a cache heads choose among the tokens so far."""
    layer, cache = _layer(), _layer().init_cache()
    for end in (9, 10, 11, 12, 24):
        seen = cache.get_seq_length()
        y = layer(X[:, seen:end], cache=cache)
        torch.testing.assert_close(y[:, -1], layer(X[:, :end])[:, -1])


def test_mosa_router_learns_and_starts_in_bounds() -> None:
    layer = _layer(dense_heads=0)
    layer(X).square().sum().backward()
    assert (layer.router.weight.grad.abs().sum(-1) > 0).all()
    for projection in (layer.q_proj, layer.k_proj, layer.v_proj):
        assert 0.8 * 12**-0.5 < projection.weight.abs().max() <= 12**-0.5
    assert 0.8 / 8 < layer.o_proj.weight.abs().max() <= 1 / 8


def test_mosa_refuses_what_it_cannot_do() -> None:
    for options in ({"kv_heads": 2}, {"dense_heads": 5}, {"sparsity": 0}, {"rotate_fraction": 1.5},
                    {"position": "rope"}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(options))):
            _layer(**options)
    with pytest.raises(ValueError, match="context"):
        _layer(causal=False)(X, X)
