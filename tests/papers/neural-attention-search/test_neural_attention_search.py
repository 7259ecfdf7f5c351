"""neural-attention-search: every token learns for how long later ones see it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attlas
from attlas.layers.sparse.neural_search import NeuralAttentionSearch, soft_mask

GLOBAL, LOCAL, SLIDING = 0, 1, 2


def layer(**options: object) -> NeuralAttentionSearch:
    given = {"dim": 32, "heads": 4, "kv_heads": 2, "window": 3, **options}
    return attlas.make("neural-attention-search", **given).double().eval()


def simulated(types: list[int], window: int) -> Tensor:
    """Which tokens every one reads, of a store from which tokens are taken as their time comes."""
    seen = torch.zeros(len(types), len(types), dtype=torch.bool)
    store: list[tuple[int, int]] = []
    for now, kind in enumerate(types):
        store = [(j, old) for j, old in store if old != SLIDING or now - j <= window]
        store.append((now, kind))
        seen[now, [j for j, _ in store]] = True
        if kind == GLOBAL:  # read for the last time, the local tokens before it go
            store = [(j, old) for j, old in store if old != LOCAL or j == now]
    return seen


def kinds(mixer: NeuralAttentionSearch, x: Tensor, mask: Tensor | None = None) -> Tensor:
    *_, inputs = mixer.prepare(x, mask=mask)
    whole, local = inputs.carried["types"].long().unbind(-1)
    return torch.where(whole > 0, GLOBAL, torch.where(local > 0, LOCAL, SLIDING))


@pytest.mark.parametrize("window", [0, 3, 100])
def test_neural_attention_search_mask_is_a_simulation_of_lifetimes(window: int) -> None:
    mixer, x = layer(window=window, position="rope"), torch.randn(3, 40, 32, dtype=torch.float64)
    q, k, _, inputs = mixer.prepare(x)
    visible, types = inputs.visible(q, k), kinds(mixer, x)
    assert len(types.unique()) == 3
    for row in range(3):
        for head in range(4):
            wanted = simulated(types[row, head // 2].tolist(), window)
            assert torch.equal(visible[row, head], wanted)


def test_neural_attention_search_counts_lifetimes_in_tokens_that_are_no_padding() -> None:
    mixer, x = layer(), torch.randn(2, 40, 32, dtype=torch.float64)
    valid = torch.rand(2, 40) > 0.3
    q, k, _, inputs = mixer.prepare(x, mask=valid)
    types, visible = kinds(mixer, x, valid), inputs.visible(q, k)
    for row in range(2):
        own = valid[row]
        wanted = simulated(types[row, 1, own].tolist(), 3)
        assert torch.equal(visible[row, 2][own][:, own], wanted)


def test_neural_attention_search_of_global_tokens_is_causal_attention() -> None:
    mixer, x = layer(position="rope"), torch.randn(2, 50, 32, dtype=torch.float64)
    with torch.no_grad():
        mixer.scorer.weight.zero_()
    plain = attlas.Attention(32, 4, kv_heads=2, causal=True, position="rope").double()
    plain.load_state_dict(mixer.state_dict(), strict=False)
    assert (kinds(mixer, x) == GLOBAL).all()
    torch.testing.assert_close(mixer(x), plain(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("sizes", [[30] + [1] * 30, [1] * 60, [25, 20, 15]])
@pytest.mark.parametrize("padded", [False, True])
def test_neural_attention_search_decodes_with_what_lives_alone(sizes: list[int], padded: bool) -> None:
    mixer, x = layer(position="rope"), torch.randn(2, 60, 32, dtype=torch.float64)
    valid = torch.ones(2, 60, dtype=torch.bool)
    valid[0, :7] = not padded
    at_once = mixer(x, mask=valid)
    q, k, _, inputs = mixer.prepare(x, mask=valid)
    visible = inputs.visible(q, k)
    cache, seen, parts = mixer.init_cache(), 0, []
    for part in x.split(sizes, dim=1):
        seen += part.shape[1]
        parts.append(mixer(part, mask=valid[:, :seen] if padded else None, cache=cache))
        held = cache.layers[0].states["held"]
        assert cache.layers[0].keys.shape[2] == held.max()
        if seen < 60:
            # The next token reads what is held, and itself.
            now = valid[:, seen]
            assert torch.equal(held[now], visible[now, ::2, seen].sum(-1) - 1)
    torch.testing.assert_close(torch.cat(parts, dim=1)[valid], at_once[valid], rtol=0, atol=1e-5)
    assert cache.get_seq_length() == 60
    assert cache.layers[0].keys.shape[2] < 45


def test_neural_attention_search_gradients_are_those_of_the_product() -> None:
    """Of the mask by the types, against the formula written as a loop, at every kind of place."""
    torch.manual_seed(0)
    hard = torch.nn.functional.one_hot(torch.randint(0, 3, (2, 2, 12)), 3)[..., :2].double()
    given = hard.clone().requires_grad_()
    ours = soft_mask(given, torch.arange(12), torch.arange(12)[None], 2)
    looped = hard.clone().requires_grad_()
    rows = []
    for t in range(12):
        for j in range(t + 1):
            whole, local = looped[..., j, 0], looped[..., j, 1]
            between = (1 - looped[..., j + 1 : t, 0]).prod(-1)
            rows.append(whole + local * between + (1 - whole - local) * (t <= j + 2))
    theirs = torch.stack(rows, dim=-1)
    t, j = torch.tril_indices(12, 12)
    torch.testing.assert_close(ours[..., t, j], theirs)
    weight = torch.randn(78, dtype=torch.float64)
    (ours[..., t, j] * weight).sum().backward()
    (theirs * weight).sum().backward()
    torch.testing.assert_close(given.grad, looped.grad)


def test_neural_attention_search_trains_its_types_by_what_they_show() -> None:
    """y is left as it is, and M_tj gets p_tj (v_j − y_t)·∂y_t, p over hidden tokens too."""
    mixer, x = layer(kv_heads=4, sparsity=0.0).train(), torch.randn(2, 20, 32, dtype=torch.float64)
    q, k, v, inputs = mixer.prepare(x)
    types = inputs.carried["types"]
    assert types.requires_grad
    y = mixer.attend(q, k, v, inputs)
    torch.testing.assert_close(y, mixer.fused(q, k, v, inputs), rtol=0, atol=0)
    weight = torch.randn_like(y)
    (found,) = torch.autograd.grad((y * weight).sum(), types)
    whole = types.detach().clone().requires_grad_()
    mask = soft_mask(whole, torch.arange(20), torch.arange(20)[None], 3)
    scores = (q @ k.mT * mixer.scale).masked_fill(torch.ones(20, 20).triu(1).bool(), -torch.inf)
    worth = torch.einsum("bhtd,bhtjd->bhtj", weight, v[:, :, None] - y[:, :, :, None])
    (mask * (scores.softmax(-1) * worth).detach()).sum().backward()
    torch.testing.assert_close(found, whole.grad)


def test_neural_attention_search_penalty_is_the_share_that_tokens_live() -> None:
    mixer, x = layer(sparsity=2.0).train(), torch.randn(2, 24, 32, dtype=torch.float64)
    torch.manual_seed(3)
    *_, inputs = mixer.prepare(x)
    whole, local = inputs.carried["types"].detach().unbind(-1)
    lived = 0.0
    for b in range(2):
        for h in range(2):
            for j in range(24):
                later = [g for g in range(j + 1, 24) if whole[b, h, g]]
                end = min([*later, 23])
                lived += float(24 - j if whole[b, h, j] else (end - j) * local[b, h, j]) / 24
    torch.testing.assert_close(mixer.auxiliary_loss.item(), 2.0 * lived * 2)
    mixer.auxiliary_loss.backward()
    assert mixer.scorer.weight.grad.abs().sum() > 0
    mixer.eval()(x)
    assert mixer.auxiliary_loss is None


def test_neural_attention_search_types_teach_the_scorer_alone() -> None:
    mixer = layer().train()
    x = torch.randn(1, 16, 32, dtype=torch.float64, requires_grad=True)
    *_, inputs = mixer.prepare(x)
    weight = torch.randn_like(inputs.carried["types"])
    found = torch.autograd.grad(
        (inputs.carried["types"] * weight).sum(), [x, mixer.scorer.weight], allow_unused=True
    )
    assert found[0] is None
    assert found[1].abs().sum() > 0


def test_neural_attention_search_with_a_bias_of_distances_drops_nothing() -> None:
    mixer, x = layer(position="alibi"), torch.randn(1, 30, 32, dtype=torch.float64)
    cache = mixer.init_cache()
    parts = [mixer(part, cache=cache) for part in x.split([20] + [1] * 10, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), mixer(x))
    assert cache.layers[0].keys.shape[2] == 30


def test_neural_attention_search_refuses_other_masks_and_bidirectional_use() -> None:
    x = torch.randn(1, 8, 32, dtype=torch.float64)
    with pytest.raises(ValueError, match="mask"):
        layer()(x, mask=attlas.masks.window(3))
    with pytest.raises(ValueError, match="causal"):
        layer(causal=False)
    with pytest.raises(ValueError, match="window"):
        layer(window=-1)
