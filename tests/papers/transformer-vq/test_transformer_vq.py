"""transformer-vq: keys are codewords, and older tokens count by their code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attlas

NAME = "transformer-vq"


def _layer(**options: object) -> torch.nn.Module:
    options = {"dim": 12, "heads": 2, "codes": 6, "block": 4, "memory": 3, **options}
    layer = attlas.make(NAME, **options).double().eval()
    with torch.no_grad():
        layer.content_bias.normal_()
        layer.distance_bias.normal_()
        layer.code_sums.copy_(2 * torch.randn_like(layer.code_sums))
        layer.code_counts.uniform_(0.5, 2.0)
    return layer


def _x(tokens: int = 21, batch: int = 2) -> Tensor:
    return torch.randn(batch, tokens, 12, dtype=torch.float64)


def _dense(layer: torch.nn.Module, x: Tensor) -> Tensor:
    q, k, v, inputs = layer.prepare(x)
    return layer.output(layer.aggregate(layer.weigh(q, k, inputs), v, inputs), inputs)


@pytest.mark.parametrize("older", [True, False])
@pytest.mark.parametrize(("block", "memory"), [(1, 1), (4, 3), (3, 8), (8, 1), (64, 64)])
def test_blocks_give_dense_attention_over_quantised_keys(
    block: int, memory: int, older: bool
) -> None:
    layer, x = _layer(block=block, memory=memory, older=older, kv_heads=1), _x()
    torch.testing.assert_close(layer(x), _dense(layer, x))


def test_weights_are_the_softmax_of_the_scores_that_the_paper_names() -> None:
    layer, x = _layer(heads=1, head_dim=4), _x(9, 1)
    tau = 4**0.25
    q, k = (p(x[0]) for p in (layer.q_proj, layer.k_proj))
    q, k = (t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt() / tau for t in (q, k))
    words = layer.code_sums[0] / layer.code_counts[0][:, None]
    k_hat = words[torch.cdist(k, words).argmin(-1)]
    scores = torch.full((9, 9), -torch.inf).double()
    for i in range(9):
        for j in range(i + 1):
            scores[i, j] = (q[i] + layer.content_bias[0, 0] / tau) @ k_hat[j]
            if i - j <= 3:
                waves = torch.tensor([(i - j) / 1e5 ** (2 * n / 12) for n in range(6)]).double()
                r = layer.r_proj(torch.cat((waves.sin(), waves.cos()))) / tau
                scores[i, j] += (q[i] + layer.distance_bias[0, 0] / tau) @ r
    torch.testing.assert_close(layer.weights(x)[0, 0], scores.softmax(-1), rtol=1e-6, atol=1e-7)


def test_a_codebook_of_all_keys_is_softmax_attention_to_the_keys_themselves() -> None:
    layer, x = _layer(heads=1, head_dim=4, codes=21), _x(21, 1)
    q, k, v, inputs = layer.prepare(x)
    with torch.no_grad():
        layer.code_sums.copy_(k[0])
        layer.code_counts.fill_(1.0)
        layer.distance_bias.zero_()
        layer.r_proj.weight.zero_()
    scores = (q + layer.content_bias * 4**-0.25) @ k.mT
    hidden = torch.ones(21, 21, dtype=torch.bool).triu(1)
    heads = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(layer(x), layer.output(heads, inputs))


def test_older_tokens_of_a_code_weigh_as_many_as_they_are() -> None:
    """Tokens beyond the memory change places without any effect, and only they do."""
    layer, x = _layer(memory=4), _x(16)
    swapped = x.clone()
    swapped[:, [0, 5]] = x[:, [5, 0]]
    torch.testing.assert_close(layer(swapped)[:, 12:], layer(x)[:, 12:])
    swapped = x.clone()
    swapped[:, [0, 13]] = x[:, [13, 0]]
    assert bool(((layer(swapped) - layer(x))[:, 14:].abs() > 1e-6).any())


def test_padding_between_tokens_is_stepped_over_with_a_cache_too() -> None:
    layer, x = _layer(), _x(20)
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[0, [3, 4, 9, 15]] = False
    valid[1, [0, 1, 13]] = False
    cache, seen, parts = layer.init_cache(), 0, []
    for part in x.split([7, 1, 6, 1, 1, 4], dim=1):
        seen += part.shape[1]
        parts.append(layer(part, mask=valid[:, :seen], cache=cache))
    stepped, whole = torch.cat(parts, dim=1), layer(x, mask=valid)
    for row in range(2):
        alone = layer(x[row : row + 1, valid[row]])[0]
        torch.testing.assert_close(whole[row, valid[row]], alone)
        torch.testing.assert_close(stepped[row, valid[row]], alone)
    counts = cache.layers[0].states["counts"].sum(-1)
    torch.testing.assert_close(counts, (valid.sum(-1, keepdim=True) - 3).expand(-1, 2).double())


def test_gradients_are_those_of_dense_attention() -> None:
    """Keys' too, where all of them are recent."""
    for memory, without in ((3, {"k_proj"}), (32, set())):
        layer, x = _layer(memory=memory), _x()
        found = []
        for y in (layer(x), _dense(layer, x)):
            layer.zero_grad()
            y.sin().sum().backward()
            found.append({n: p.grad.clone() for n, p in layer.named_parameters()})
        for name, grad in found[0].items():
            if name.split(".")[0] not in without:
                torch.testing.assert_close(grad, found[1][name], msg=name)


def test_codebooks_are_running_means_of_the_keys_that_they_stand_for() -> None:
    layer, x = _layer(kv_heads=1, gamma=0.9), _x()
    valid = torch.ones(2, 21, dtype=torch.bool)
    valid[0, :6] = False
    _, k, *_ = layer.prepare(x, mask=valid)
    sums, counts = 0.9 * layer.code_sums, 0.9 * layer.code_counts
    commitment, codes = torch.zeros(()).double(), layer.nearest(k)
    for b, t in valid.nonzero().tolist():
        code = codes[b, 0, t]
        commitment += (k[b, 0, t] - layer.codebook[0, code]).square().sum() / valid.sum()
        sums[0, code] += 0.1 * k[b, 0, t]
        counts[0, code] += 0.1
    layer(x, mask=valid)
    assert layer.auxiliary_loss is None
    layer.train()(x, mask=valid)
    torch.testing.assert_close(layer.code_sums, sums)
    torch.testing.assert_close(layer.code_counts, counts)
    torch.testing.assert_close(layer.auxiliary_loss, 1e-4 * commitment)


def test_training_brings_codewords_to_the_keys_and_keys_to_codewords() -> None:
    layer, x = _layer(gamma=0.5, commitment=1.0).train(), _x(64)
    optimiser = torch.optim.Adam(layer.k_proj.parameters(), 0.01)
    losses = []
    for _ in range(40):
        layer(x)
        optimiser.zero_grad()
        layer.auxiliary_loss.backward()
        optimiser.step()
        losses.append(layer.auxiliary_loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize(
    "options",
    [{"codes": 0}, {"block": 0}, {"memory": 0}, {"value_dim": 0}, {"gamma": 1.0},
     {"wavelength": 0.0}, {"commitment": -1.0}, {"position": "rope"}],
)  # fmt: skip
def test_bad_options_are_named(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        attlas.make(NAME, **{"dim": 8, "heads": 2, **options})


def test_weights_of_what_a_state_has_taken_in_are_refused() -> None:
    layer, x = _layer(), _x()
    cache = layer.init_cache()
    layer(x, cache=cache)
    with pytest.raises(ValueError, match="cache"):
        layer.weigh(*[p for i, p in enumerate(layer.prepare(x, cache=cache)) if i != 2])
