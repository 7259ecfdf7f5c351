"""transformer-brain-encoder: every clause of the catalogue row's works_when."""

from __future__ import annotations

import pytest
import torch

import attlas
from attlas.errors import UserError
from attlas.systems.transformer_brain_encoder import (
    GRID,
    BrainEncoder,
    SpatialFeature,
    explained,
    on_shape,
    ridge,
    sines,
)


def made(**options):
    torch.manual_seed(0)
    sizes = {"dim": 12, "heads": 2, "ff": 8, "areas": 4, "units": (5, 3), "dropout": 0.0}
    return BrainEncoder(**{**sizes, **options}).double()


def inputs():
    torch.manual_seed(1)
    features = torch.randn(3, 12, 4, 5, dtype=torch.float64)
    return features, sines(12, 4, 5).double()


# Reductions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", ["whole", "linear"])
def test_transformer_brain_encoder_with_a_constant_score_pools_the_mean(body):
    """Moving features between patches changes nothing; a linear body reads the mean features."""
    net, (features, places) = made(body=body), inputs()
    routing = net.routing if body == "linear" else net.decoder[0].routing
    torch.nn.init.zeros_(routing.k_proj.weight)
    tokens, found = net.tokens(features, places)
    torch.testing.assert_close(found, torch.full_like(found, 1 / 20))
    mean = features.mean((2, 3), keepdim=True).expand_as(features)
    torch.testing.assert_close(net.tokens(mean, places)[0], tokens)
    if body == "linear":
        pooled = routing.o_proj(routing.v_proj(features.mean((2, 3))))
        torch.testing.assert_close(tokens, pooled[:, None].expand(-1, 4, -1))


def test_transformer_brain_encoder_with_keys_of_places_is_the_spatial_feature_baseline():
    net, (features, places) = made(keys="places", body="linear", heads=1, units=(5,)), inputs()
    _, found = net.tokens(features, places)
    torch.testing.assert_close(found, found[:1].expand(3, -1, -1))  # one map for all pictures
    assert found.std() > 0
    baseline = SpatialFeature(12, 4, 20, 5).double()
    with torch.no_grad():
        read, routing = net.readout[0], net.routing
        baseline.map.copy_(found[0])
        through = read.weight @ routing.o_proj.weight
        baseline.readout.weight.copy_(through @ routing.v_proj.weight)
        bias = through @ routing.v_proj.bias + read.weight @ routing.o_proj.bias + read.bias
        baseline.readout.bias.copy_(bias)
    torch.testing.assert_close(net(features, places)[0], baseline(features))


def test_transformer_brain_encoder_whole_body_with_keys_of_places_has_one_map():
    net, (features, places) = made(keys="places"), inputs()
    _, found = net.tokens(features, places)
    torch.testing.assert_close(found, found[:1].expand(3, -1, -1))
    assert not torch.equal(made().tokens(features, places)[1][0], found[0])


# Simulated responses --------------------------------------------------------------------------------


def fitted(encoder, **options):
    small = {"backbone": "filters", "units": 4, "pictures": 600, "questions": 100, "rate": 3e-3}
    small |= {"dim": 64, "ff": 64, "steps": 300, "encoder": encoder, **options}
    system = attlas.make("transformer-brain-encoder", **small)
    system.build()
    system.fit(0)
    examples = system.data("test", 0)
    said = system.predict([e.input for e in examples])
    return system, examples, explained(said, [e.target for e in examples])


def test_transformer_brain_encoder_explains_more_than_both_baselines_where_objects_move():
    """A short training; what a long one reaches, and where its maps peak, the report tells."""
    system, examples, own = fitted("attention")
    rivals = [fitted(name)[2] for name in ("map", "ridge")]
    assert own > max(rivals) + 0.03
    found = system.maps([e.input for e in examples])
    assert found.shape == (100, 4, GRID, GRID)
    peaks = found.flatten(2).argmax(-1)
    shown = [
        on_shape(int(peaks[i, shape[0]]), shape)
        for i, example in enumerate(examples)
        for shape in example.input.shapes
    ]
    assert sum(shown) / len(shown) > 0.25  # by chance 6 of 64 patches


def test_transformer_brain_encoder_ridge_finds_linear_responses():
    torch.manual_seed(0)
    x, weight = torch.randn(200, 20), torch.randn(20, 3)
    found, bias = ridge(x, x @ weight + 2)
    torch.testing.assert_close(found, weight, atol=0.02, rtol=0.02)
    torch.testing.assert_close(bias, torch.full((3,), 2.0), atol=0.02, rtol=0.02)


def test_transformer_brain_encoder_refuses_sizes_that_do_not_fit():
    with pytest.raises(UserError, match="heads"):
        made(heads=5)
    with pytest.raises(UserError, match="areas"):
        made(areas=3)
