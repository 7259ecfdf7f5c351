"""routing-transformer: clusters, what they cost, and how centroids learn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attlas
from attlas import masks, ops
from attlas.layers.sparse import routing_transformer

X = torch.randn(2, 24, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _layer(**options):
    torch.manual_seed(0)
    options = {"dim": 16, "heads": 4, "local_heads": 1, "clusters": 3, "causal": True, **options}
    return attlas.make("routing-transformer", **options).double().eval()


def _by_definition(layer, x: Tensor) -> Tensor:
    """Head by head, cluster by cluster and query by query of one text."""
    n, heads = len(x), []
    for head in range(layer.heads):
        rows = slice(head * layer.head_dim, (head + 1) * layer.head_dim)
        q, v = x @ layer.q_proj.weight[rows].T, x @ layer.v_proj.weight[rows].T
        k = ops.unit(q) if layer.shared else x @ layer.k_proj.weight[rows].T
        routed, found = head - layer.local_heads, [[] for _ in range(n)]
        groups = layer.clusters if routed >= 0 else 1
        for c in range(groups):
            asking = told = torch.arange(n)
            memories = 0
            if routed >= 0:
                width = min(layer.window or -(-n // layer.clusters), n)
                near = (ops.unit(t) @ layer.means[routed, c] for t in (q, k))
                asking, told = (t.argsort(descending=True)[:width] for t in near)
                memories = layer.memories
            for i in asking.tolist():
                met = [j for j in told.tolist() if j <= i or not layer.causal]
                if routed < 0:
                    met = [j for j in met if abs(i - j) < layer.local_window]
                if layer.shared:
                    others = [j for j in met if j != i]
                    met = others if others or memories else met
                keys, values = k[met], v[met]
                if memories:
                    keys = torch.cat((layer.mem_key[routed, c], keys))
                    values = torch.cat((layer.mem_value[routed, c], values))
                if len(keys):
                    found[i].append((keys @ q[i] * layer.scale).softmax(-1) @ values)
        zero = x.new_zeros(layer.head_dim)
        heads.append(torch.stack([torch.stack(f).mean(0) if f else zero for f in found]))
    return torch.cat(heads, dim=-1) @ layer.o_proj.weight.T


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("options", [
    {}, {"causal": False}, {"window": 4}, {"memories": 2}, {"local_heads": 0, "window": 99},
    {"local_heads": 4, "local_window": 5}, {"clusters": 30, "memories": 1, "causal": False},
])  # fmt: skip
def test_routing_transformer_is_its_definition(options: dict, shared: bool) -> None:
    layer = _layer(shared=shared, **options)
    wanted = torch.stack([_by_definition(layer, x) for x in X])
    torch.testing.assert_close(layer(X), wanted)
    every = torch.ones(1, 1, 24, 24, dtype=torch.bool)  # another way, over all pairs
    torch.testing.assert_close(layer(X, mask=every), wanted)
    valid = torch.ones(2, 24, dtype=torch.bool)
    valid[0, :9], valid[1, 20:], valid[1, 5] = False, False, False
    for row in range(2):
        alone = _by_definition(layer, X[row, valid[row]])
        torch.testing.assert_close(layer(X, mask=valid)[row, valid[row]], alone)
    window = masks.window(5)
    torch.testing.assert_close(layer(X, mask=window), layer(X, mask=masks.dense(window, 24, 24)))


@pytest.mark.parametrize("causal", [True, False])
def test_routing_transformer_with_one_cluster_is_full_attention(causal: bool) -> None:
    layer = _layer(clusters=1, window=24, shared=False, local_heads=0, causal=causal)
    plain = attlas.make("softmax", dim=16, heads=4, causal=causal).double()
    plain.load_state_dict(layer.state_dict(), strict=False)
    torch.testing.assert_close(layer(X), plain(X))


def test_routing_transformer_is_causal_in_pairs() -> None:
    """No query weighs a key to come; and where clusters choose alike, those to come change nothing."""
    for shared in (True, False):
        layer = _layer(shared=shared)
        assert (layer.weights(X).triu(1) == 0).all()
        one = _layer(shared=shared, clusters=1)
        changed = torch.cat((X[:, :11], 10 * X[:, 11:].flip(1)), dim=1)
        torch.testing.assert_close(one(changed)[:, :11], one(X)[:, :11])


def test_routing_transformer_cost_grows_as_n_to_three_halves(monkeypatch) -> None:
    met: list[int] = []
    real = routing_transformer.ops.attend

    def counted(q, k, v, **options):
        met.append(q.shape[1] * q.shape[2] * k.shape[2])
        return real(q, k, v, **options)

    monkeypatch.setattr(routing_transformer.ops, "attend", counted)
    for root in (8, 16, 32):
        met.clear()
        n = root**2
        _layer(clusters=root, local_heads=0, heads=1)(torch.randn(1, n, 16).double())
        assert met == [root**3], "pairs of one head at w = √n"


def test_routing_transformer_step_is_the_last_token_of_a_whole_pass() -> None:
    """Behind a cache clusters choose among the tokens so far."""
    for shared in (True, False):
        layer = _layer(shared=shared, memories=1)
        cache = layer.init_cache()
        for end in (9, 10, 11, 12, 24):
            y = layer(X[:, cache.get_seq_length() : end], cache=cache)
            torch.testing.assert_close(y[:, -1], layer(X[:, :end])[:, -1])


def test_routing_transformer_centroids_follow_the_tokens() -> None:
    """Of four directions each gets a centroid's neighbourhood; padding has no say; loss falls."""
    layer = _layer(heads=1, local_heads=0, clusters=4, decay=0.9, causal=False, head_dim=16).train()
    with torch.no_grad():
        layer.q_proj.weight.copy_(torch.eye(16))
        layer.means.copy_(ops.unit(torch.eye(16)[:4] + 0.5)[None])
    x = torch.eye(16, dtype=torch.float64)[:4].repeat(6, 1)[None]
    junk = torch.cat((x, 10 * torch.randn_like(x)), dim=1)
    valid = (torch.arange(48) < 24)[None]
    losses = []
    for _ in range(50):
        layer(junk, mask=valid)
        losses.append(layer.auxiliary_loss.item())
    assert losses[-1] < 0.01 * losses[0]
    torch.testing.assert_close(layer.means[0], torch.eye(16).double()[:4], atol=0.02, rtol=0)
    before = layer.means.clone()
    layer.eval()(x)
    assert torch.equal(layer.means, before)
    assert layer.auxiliary_loss is None


def test_routing_transformer_refuses_what_it_cannot_do() -> None:
    for options in ({"kv_heads": 2}, {"local_heads": 5}, {"clusters": 0}, {"window": 0}, {"decay": 1.0},
                    {"memories": -1}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(options))):
            _layer(**options)
    with pytest.raises(ValueError, match="context"):
        _layer(causal=False)(X, X)
