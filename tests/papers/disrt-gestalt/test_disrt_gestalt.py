"""disrt-gestalt: the clauses of the catalogue row's works_when."""

from __future__ import annotations

import pytest
import torch

import attlas
from attlas.errors import UserError
from attlas.models.load import load
from attlas.tasks.train.disrt_gestalt import (
    TopK,
    figure_ground,
    illusory_contours,
    odd_one_out,
    outlines,
    proximity,
    shuffle,
)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def triplets(rows=40, **options):
    task = attlas.make("disrt-gestalt", **options)
    pictures = outlines(rng(), rows, task.size)
    return task.triplets(rng(1), pictures)


@pytest.mark.parametrize("breaking", ["shuffle", "texture"])
def test_disrt_gestalt_a_texture_feature_is_at_chance_and_a_template_finds_all(breaking):
    given = triplets(breaking=breaking)
    if breaking == "shuffle":  # mean and spread of each patch, averaged over patches
        pieces = given.unfold(3, 16, 16).unfold(4, 16, 16)
        texture = torch.cat([pieces.mean((-2, -1)), pieces.std((-2, -1))], dim=2).mean((-2, -1))
    else:  # mean amplitude at each frequency
        texture = torch.fft.rfft2(given).abs().flatten(2)
    assert odd_one_out(texture) == pytest.approx(1 / 3, abs=0.01)
    # 0 for the image and above 0 for both others: the image is farther than either, whatever they are.
    found = (given - given[:, :1]).flatten(2).norm(dim=-1, keepdim=True)
    assert odd_one_out(found) == 1.0


def test_disrt_gestalt_patches_are_kept_and_their_order_is_not():
    pictures = outlines(rng(), 4, 64)
    mixed = shuffle(rng(1), pictures, 16)
    assert not torch.equal(mixed, pictures)

    def sums(x):
        return x.unfold(2, 16, 16).unfold(3, 16, 16).double().sum((1, 4, 5)).flatten(1).sort(1).values

    torch.testing.assert_close(sums(mixed), sums(pictures))


def test_disrt_gestalt_top_k_of_all_units_is_the_identity():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    assert torch.equal(TopK(8)(x), x)
    kept = TopK(3)(x)
    assert ((kept != 0).sum(-1) == 3).all()
    torch.testing.assert_close(kept.sum(-1), x.topk(3).values.sum(-1))
    with pytest.raises(UserError, match="k takes"):
        TopK(0)


@pytest.mark.parametrize("make", [illusory_contours, proximity, figure_ground])
def test_disrt_gestalt_stimuli_differ_in_the_whole_alone(make):
    one, other = make(rng(), 3, 64)
    assert one.shape == other.shape == (3, 3, 64, 64)
    assert (one - other).abs().amax((1, 2, 3)).min() > 0.5
    ink = (one - one.mean((2, 3), keepdim=True)).square().mean((1, 2, 3))
    rest = (other - other.mean((2, 3), keepdim=True)).square().mean((1, 2, 3))
    assert proximity is not make or torch.allclose(ink, rest)


def test_disrt_gestalt_vit_sees_the_whole_by_its_positions():
    try:
        model = load("vit")
    except UserError as error:
        pytest.skip(str(error))
    given = triplets(rows=4, size=84, patch=14)
    intact = by_layer(model, given)
    with torch.no_grad():
        model.embeddings.position_embeddings[:, 1:] = 0
    without = by_layer(model, given)
    assert max(intact) > 0.6
    assert abs(sum(without) / len(without) - 1 / 3) < abs(sum(intact) / len(intact) - 1 / 3)


def by_layer(model, given):
    """The score by the mean of the patches' states behind each block."""
    rows = given.shape[0]
    with torch.no_grad():
        pixels = (given.flatten(0, 1) - 0.45) / 0.225
        states = model(pixel_values=pixels, output_hidden_states=True).hidden_states
    return [odd_one_out(h[:, 1:].mean(1).unflatten(0, (rows, 3))) for h in states]
