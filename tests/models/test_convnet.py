"""The convolutional network: any module in its blocks, saved and loaded as others are."""

import pytest
import torch
import transformers as hf
from torch import nn

import attlas
from attlas.catalog import registry
from attlas.kinds.feature_map import FeatureMap

SIZES = {"num_channels": 1, "hidden_sizes": [16, 32], "depths": [1, 2], "num_labels": 5}
IMAGES = torch.randn(2, 1, 9, 8, generator=torch.Generator().manual_seed(0))


class Remembers(FeatureMap):
    """Adds what earlier maps hold on average, times a constant that no checkpoint keeps."""

    takes_previous = True

    def setup(self):
        super().setup()
        self.read = nn.Linear(sum(self.previous), self.channels)
        self.register_buffer("share", torch.tensor(0.5), persistent=False)

    def gate(self, x, previous=()):
        seen = torch.cat([t.mean((2, 3)) for t in previous], dim=1)
        return self.share * self.read(seen)[..., None, None].sigmoid()


@pytest.fixture
def remembers():
    registry.mechanism("remembers", paper="")(Remembers)
    yield
    registry.unregister("remembers")


@pytest.mark.parametrize(
    "attention", ["none", "remembers", {"name": "ela-efficient-local", "version": "S"}]
)
def test_learns_saves_and_loads(attention, tmp_path, remembers):
    model = attlas.ConvNet(attlas.ConvNetConfig(attention=attention, **SIZES)).eval()
    model(IMAGES, labels=torch.tensor([0, 4])).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    model.save_pretrained(tmp_path)
    for loaded in (
        attlas.ConvNet.from_pretrained(tmp_path),
        hf.AutoModelForImageClassification.from_pretrained(tmp_path),
    ):
        assert torch.equal(loaded(IMAGES).logits, model(IMAGES).logits)
    with pytest.raises(ValueError, match="cannot be loaded as"):
        attlas.ConvNet.from_pretrained(tmp_path, attention="softmax")


def test_earlier_maps_are_those_of_the_stem_and_of_the_stages_before(remembers):
    model = attlas.ConvNet(attlas.ConvNetConfig(attention="remembers", **SIZES)).eval()
    blocks = [block for stage in model.model.stages for block in stage]
    assert [b.attention.previous for b in blocks] == [(16,), (16, 16), (16, 16)]
    given = []
    for block in blocks:
        block.attention.register_forward_pre_hook(lambda module, args: given.append(args[1]))
    states = model(IMAGES, output_hidden_states=True).hidden_states
    for maps, earlier in zip(given, ([0], [0, 1], [0, 1]), strict=True):
        assert all(torch.equal(t, states[i]) for t, i in zip(maps, earlier, strict=True))
    assert [list(t.shape[1:]) for t in states] == [[16, 9, 8], [16, 9, 8], [32, 5, 4]]


def test_an_images_logits_do_not_depend_on_the_batch():
    model = attlas.ConvNet(attlas.ConvNetConfig(attention="ela-efficient-local", **SIZES))
    for mode in (True, False):
        model.train(mode)
        torch.testing.assert_close(model(IMAGES).logits[:1], model(IMAGES[:1]).logits)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"attention": "ela-eficient-local"}, "did you mean 'ela-efficient-local'"),
        (
            {"attention": "softmax"},
            "'softmax' is no module for feature maps but a registered layer",
        ),
        ({"attention": {"version": "T"}}, "options with a 'name'"),
        ({"attention": {"name": "none", "version": "T"}}, "'none' takes no options"),
        ({"attention": torch.ones(1)}, "what JSON can"),
        ({"depths": [1]}, "depths must hold"),
        ({"hidden_sizes": [16, 0]}, "hidden_sizes takes a whole number"),
    ],
)
def test_wrong_configurations_are_refused_by_name(options, said):
    with pytest.raises(ValueError, match=said):
        attlas.ConvNetConfig(**{**SIZES, **options})


def test_what_does_not_fit_is_refused_with_its_stage():
    config = attlas.ConvNetConfig(attention={"name": "ela", "norm_groups": 32}, **SIZES)
    with pytest.raises(ValueError, match="stage 0: norm_groups must divide channels=16, got 32"):
        attlas.ConvNet(config)
    with pytest.raises(ValueError, match="pixel_values must be"):
        attlas.ConvNet(attlas.ConvNetConfig(**SIZES))(IMAGES[0])
