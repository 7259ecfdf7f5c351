"""flowformer: flows are conserved on both sides, and both forms are what their equations say."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import attlas
from attlas import masks


def _layer(loud: float = 1.0, **options):
    torch.manual_seed(0)
    layer = attlas.make("flowformer", **{"dim": 16, "heads": 2, **options}).double().eval()
    with torch.no_grad():
        layer.q_proj.weight *= loud
        layer.k_proj.weight *= loud
    return layer


def _wanted(q, k, v, causal: bool):
    """One head's outputs, flow by flow; without ε."""
    q, k = q.sigmoid(), k.sigmoid()
    flows = q @ k.mT  # into sink t out of source s
    sinks, sources = flows.shape
    rows = []
    if not causal:
        evenly_out, evenly_in = flows / flows.sum(0), flows / flows.sum(1, keepdim=True)
        strength = evenly_in.sum(0).clamp(-1, 1).softmax(0) * sources
        allocation = (evenly_out.sum(1) * sinks / sources).sigmoid()
        return allocation[:, None] * (evenly_in * strength) @ v
    into = torch.stack([flows[t, : t + 1].sum() for t in range(sinks)])
    out_of = torch.stack([flows[: s + 1, s].sum() for s in range(sinks)])
    count = torch.arange(1, sinks + 1).double()
    source = [(flows[: s + 1, s] * (count / into)[: s + 1]).sum() / (s + 1) for s in range(sinks)]
    risen = torch.stack(source).clamp(-1, 1).exp()
    strength = count * risen / risen.cumsum(0)
    for t in range(sinks):
        sink = (flows[t, : t + 1] * (count / out_of)[: t + 1]).sum() / (t + 1)
        rows.append(sink.sigmoid() * (flows[t, : t + 1] * strength[: t + 1] / into[t]) @ v[: t + 1])
    return torch.stack(rows)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("loud", [1.0, 6.0])
def test_flowformer_is_its_equations(causal: bool, loud: float) -> None:
    """Loud queries and keys spread flows, so that the bound on sources binds for some only."""
    layer, x = _layer(loud, causal=causal, eps=1e-13), torch.randn(2, 11, 16).double()
    q, k, v, inputs = layer.prepare(x)
    wanted = torch.stack([
        torch.stack([_wanted(q[b, h], k[b, h], v[b, h], causal) for h in range(2)]) for b in range(2)
    ])  # fmt: skip
    torch.testing.assert_close(layer.attend(q, k, v, inputs), wanted)
    torch.testing.assert_close(layer.weights(x) @ v, wanted)


def test_flowformer_of_two_sequences_is_its_equations() -> None:
    layer, x, context = _layer(3.0, eps=1e-13), torch.randn(1, 5, 16), torch.randn(1, 9, 16)
    q, k, v, inputs = layer.prepare(x.double(), context.double())
    wanted = torch.stack([_wanted(q[0, h], k[0, h], v[0, h], False) for h in range(2)])
    torch.testing.assert_close(layer.attend(q, k, v, inputs)[0], wanted)


def test_flowformer_conserves_both_sides_of_the_flow() -> None:
    layer, x = _layer(3.0, eps=1e-13), torch.randn(2, 12, 16).double()
    q, k, _, inputs = layer.prepare(x)
    q, k = layer.features(q, k, inputs)
    incoming = layer.flow(q, k.sum(2, keepdim=True))
    outgoing = layer.flow(k, q.sum(2, keepdim=True))
    ones = torch.ones(2, 2, 12).double()
    torch.testing.assert_close((q / incoming @ k.mT).sum(-1), ones)
    torch.testing.assert_close((q @ (k / outgoing).mT).sum(-2), ones)
    # So what all sinks take in of normalised sources is as much as there are sources, and likewise.
    sink = layer.flow(q, (k / outgoing).sum(2, keepdim=True))
    source = layer.flow(k, (q / incoming).sum(2, keepdim=True))
    torch.testing.assert_close(sink.sum((2, 3)), 12 * ones[..., 0])
    torch.testing.assert_close(source.sum((2, 3)), 12 * ones[..., 0])


def test_flowformer_sources_that_offer_more_win_the_competition() -> None:
    """Strengths are 1 on average, and rise with what sinks draw, up to the bound."""
    layer, x = _layer(6.0), torch.randn(1, 12, 16).double()
    q, k, _, inputs = layer.prepare(x)
    _, sources, _ = layer.terms(q, k, inputs)
    asked, plain = layer.features(q, k, inputs)
    strength = (sources / plain).mean(-1)
    torch.testing.assert_close(strength.mean(-1), torch.ones(1, 2).double())
    drawn = layer.flow(plain, (asked / layer.flow(asked, plain.sum(2, keepdim=True))).sum(2, True))
    order = drawn.squeeze(-1).clamp(max=1.0).argsort(-1)
    assert bool((strength.gather(-1, order).diff(dim=-1) > -1e-9).all())
    assert strength.std() > 0.05


def test_flowformer_decodes_from_six_sums_and_one_state() -> None:
    layer, x = _layer(causal=True), torch.randn(2, 9, 16).double()
    cache = layer.init_cache()
    steps = [layer(token, cache=cache) for token in x.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), layer(x))
    shapes = {name: list(held.shape[2:]) for name, held in cache.layers[0].states.items()}
    assert shapes.pop("state") == [8, 8]
    assert shapes.pop("count") == shapes.pop("risen") == [1, 1]
    assert list(shapes.values()) == [[1, 8]] * 4


def test_flowformer_takes_causality_from_the_call_too() -> None:
    x = torch.randn(1, 7, 16).double()
    torch.testing.assert_close(_layer()(x, mask=masks.causal), _layer(causal=True)(x))
    torch.testing.assert_close(_layer(mask=masks.causal)(x), _layer(causal=True)(x))


@pytest.mark.parametrize("causal", [False, True])
def test_flowformer_doubles_its_work_when_n_doubles(causal: bool) -> None:
    layer, work = attlas.make("flowformer", dim=32, heads=2, causal=causal), []
    for tokens in (256, 512):
        with FlopCounterMode(display=False) as count:
            layer(torch.randn(1, tokens, 32))
        work.append(count.get_total_flops())
    assert work[1] == 2 * work[0]


def test_flowformer_refuses_an_eps_that_lets_flows_vanish() -> None:
    with pytest.raises(ValueError, match="eps"):
        _layer(eps=0.0)
