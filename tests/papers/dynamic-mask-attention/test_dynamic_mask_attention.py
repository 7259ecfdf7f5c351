"""dynamic-mask-attention: which keys are kept, and what they count for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

import attlas
from attlas import masks
from attlas.layers.sparse import dynamic_mask
from attlas.tasks.train.recall import pairs_and_queries

X = torch.randn(2, 40, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _layer(**options):
    torch.manual_seed(0)
    layer = attlas.make("dma", **{"dim": 16, "heads": 4, "kv_heads": 2, "causal": True, **options})
    torch.nn.init.normal_(layer.A)
    return layer.double().eval()


def _by_definition(layer, visible: Tensor) -> Tensor:
    """The output, query by query; of equal keys the newest."""
    q, k, v, _ = layer.prepare(X)
    b = layer.A * softplus(layer.dt_proj(v.transpose(1, 2).flatten(2)))
    b = (b.exp() if layer.form == "exponential" else b).transpose(1, 2)
    heads = torch.zeros_like(q)
    for row in range(X.shape[0]):
        for head in range(layer.heads):
            own = head // 2
            for at in range(X.shape[1]):
                found = visible[row, at].nonzero()[:, 0].tolist()
                best = sorted(found, key=lambda j: (-b[row, own, j].item(), -j))[: layer.keep]
                if best:
                    scores = k[row, own, best] @ q[row, head, at] * layer.scale + b[row, own, best]
                    heads[row, head, at] = scores.softmax(-1) @ v[row, own, best]
    return layer.o_proj(heads.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("form", ["exponential", "linear"])
@pytest.mark.parametrize("causal", [True, False])
def test_dynamic_mask_attention_is_its_definition(form: str, causal: bool, monkeypatch) -> None:
    monkeypatch.setattr(dynamic_mask, "BLOCK", 16)
    valid = torch.ones(2, 40, dtype=torch.bool)
    valid[1, :17], valid[0, 20:25], valid[0, 36:] = False, False, False
    below = torch.ones(40, 40, dtype=torch.bool)
    below = below.tril() if causal else below
    for keep in (1, 7, 25):
        layer = _layer(form=form, causal=causal, keep=keep)
        for mask, visible in (
            (None, below.expand(2, -1, -1)), (valid, below & valid[:, None]),
            (masks.window(9), (below & masks.dense(masks.window(9), 40, 40)[0, 0]).expand(2, -1, -1)),
        ):  # fmt: skip
            wanted = _by_definition(layer, visible)
            given = layer(X, mask=mask)
            torch.testing.assert_close(given, wanted)
    with torch.no_grad():
        layer.A.zero_()
    torch.testing.assert_close(layer(X), _by_definition(layer, below.expand(2, -1, -1)))


@pytest.mark.parametrize("form", ["exponential", "linear"])
def test_dynamic_mask_attention_with_all_keys_and_no_importance_is_softmax(form: str) -> None:
    layer = _layer(form=form, keep=40)
    plain = attlas.make("softmax", dim=16, heads=4, kv_heads=2, causal=True).double()
    plain.load_state_dict(layer.state_dict(), strict=False)
    with torch.no_grad():
        layer.A.zero_()
    torch.testing.assert_close(layer(X), plain(X), atol=1e-6, rtol=0)


def test_dynamic_mask_attention_starts_with_a_window() -> None:
    """All keys are equal then, and the newest are kept."""
    layer = attlas.make("dma", dim=16, heads=4, causal=True, keep=9).double()
    plain = attlas.make("softmax", dim=16, heads=4, causal=True, mask=masks.window(9)).double()
    plain.load_state_dict(layer.state_dict(), strict=False)
    torch.testing.assert_close(layer(X), plain(X))


def test_dynamic_mask_attention_looks_at_few_pairs() -> None:
    """n (w + block) of n² pairs, for the same answer."""
    torch.manual_seed(0)
    layer = attlas.make("dma", dim=16, heads=2, causal=True, keep=256).eval()
    torch.nn.init.normal_(layer.A)
    x = torch.randn(1, 4096, 16)
    q, k, v, inputs = layer.prepare(x)
    assert isinstance(inputs.pairs, dynamic_mask.Kept)
    met: list[int] = []
    real = dynamic_mask.ops.attend

    def counted(q, k, v, **options):
        met.append(q.shape[2] * k.shape[2])
        return real(q, k, v, **options)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(dynamic_mask.ops, "attend", counted)
        heads = layer.attend(q, k, v, inputs)
    assert sum(met) <= 4096 * (256 + dynamic_mask.BLOCK)
    seen = inputs.visible(q, k)
    assert int(seen.sum(-1).max()) == 256
    q, k = layer.features(q, k, inputs)
    torch.testing.assert_close(heads, real(q, k, v, mask=seen, scale=layer.scale))


def test_dynamic_mask_attention_refuses_no_keys() -> None:
    with pytest.raises(ValueError, match="keep"):
        _layer(keep=0)
    with pytest.raises(ValueError, match="form"):
        _layer(form="softplus")


class _Model(torch.nn.Module):
    def __init__(self, tokens: int, **options) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(tokens, 64)
        self.layers = torch.nn.ModuleList(
            attlas.make("dma", dim=64, heads=2, causal=True, position="rope", **options) for _ in range(2)
        )
        self.norms = torch.nn.ModuleList(torch.nn.RMSNorm(64) for _ in range(3))
        self.head = torch.nn.Linear(64, tokens)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for norm, layer in zip(self.norms, self.layers, strict=False):
            x = x + layer(norm(x))
        return self.head(self.norms[2](x))


def test_dynamic_mask_attention_recalls_with_a_quarter_of_the_keys() -> None:
    """Multi-query associative recall, four pairs among 32 tokens, eight keys seen."""
    torch.manual_seed(0)
    model, rng = _Model(9, keep=8), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(250):
        batch = pairs_and_queries(rng, 64, 4, 4, 32)
        loss = cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["targets"].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    held_out = pairs_and_queries(torch.Generator().manual_seed(1), 512, 4, 4, 32)
    asked = held_out["targets"] >= 0
    with torch.no_grad():
        right = model(held_out["input_ids"]).argmax(-1)[asked] == held_out["targets"][asked]
    assert right.float().mean() > 0.95
