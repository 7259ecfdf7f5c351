"""What the catalogue asks of efficient local attention, clause by clause."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import attlas
from attlas.modules.ela import ELA
from attlas.tasks.train.digits_shifted import SIDE, DigitsShifted

SEEDS = (0, 1, 2)
VERSIONS = ("T", "B", "S", "L")


def noisy(**options: object) -> ELA:
    module = ELA(**{"channels": 32, **options}).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return module


@pytest.mark.parametrize("version", VERSIONS)
def test_a_transposed_image_gives_transposed_output(version):
    module, x = noisy(version=version), torch.randn(2, 32, 9, 12).double()
    y = module(x)
    assert not torch.allclose(y, x)
    torch.testing.assert_close(module(x.mT), y.mT, rtol=1e-12, atol=1e-12)


def test_weights_of_one_are_the_identity():
    module, x = noisy(), torch.randn(2, 32, 9, 12).double()
    nn.init.zeros_(module.norm.weight)
    nn.init.constant_(module.norm.bias, 40.0)  # whose sigmoid is 1 in float64
    assert torch.equal(module(x), x)


@pytest.mark.parametrize(
    ("version", "kernel", "per_group", "norm_groups"),
    [("T", 5, 1, 32), ("B", 7, 1, 16), ("S", 5, 8, 16), ("L", 7, 8, 16)],
)
@pytest.mark.parametrize("channels", [32, 64, 96])
def test_parameters_are_those_of_the_formula(version, kernel, per_group, norm_groups, channels):
    module = attlas.make("ela-efficient-local", channels=channels, version=version)
    count = sum(p.numel() for p in module.parameters())
    assert count == kernel * channels * per_group + 2 * channels
    assert module.norm.num_groups == norm_groups


def test_weights_are_those_of_the_equations():
    """Written out by loops over groups and taps; kernel, groups and norm groups mixed."""
    module = noisy(kernel=3, groups=4, norm_groups=8)
    x = torch.randn(2, 32, 5, 6).double()
    strip, w = x.mean(3), module.conv.weight
    padded = nn.functional.pad(strip, (1, 1))
    mixed = torch.stack([
        sum(w[c, :, tap] @ padded[:, c // 8 * 8 : c // 8 * 8 + 8, tap : tap + 5] for tap in range(3))
        for c in range(32)
    ], dim=1)  # fmt: skip
    grouped = mixed.view(2, 8, -1)
    centred = grouped - grouped.mean(-1, keepdim=True)
    normed = (centred / (grouped.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()).view(2, 32, 5)
    rows = (normed * module.norm.weight[:, None] + module.norm.bias[:, None]).sigmoid()
    torch.testing.assert_close(module.strips(x)[0], rows)
    torch.testing.assert_close(module(x), x * rows[..., None] * module.strips(x)[1][:, :, None])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"version": "M"}, "version must be 'T' or 'B'"),
        ({"kernel": 4}, "kernel must be odd"),
        ({"groups": 3}, "groups must divide channels=32, got 3"),
        ({"norm_groups": 5}, "norm_groups must divide channels=32, got 5"),
        (
            {"channels": 24},
            "norm_groups must divide channels=24, got 16, version B's; give norm_groups",
        ),
        ({"channels": 4, "version": "S"}, "groups must divide channels=4, got 0, version S's"),
    ],
)
def test_wrong_options_are_refused_by_name(options, said):
    with pytest.raises(ValueError, match=said):
        ELA(**{"channels": 32, **options})


# In a network ----------------------------------------------------------------------------------------


def trained(attention: str, seed: int, steps: int, rows: int) -> tuple[float, list[float]]:
    """(accuracy, share of images whose peak of a_h · a_w lies on the digit, for each block) on 512
    unseen digits at random places of 16 × 16 pixels, a twentieth of them bright specks."""
    task = DigitsShifted(size=16, specks=0.05)
    torch.manual_seed(seed)
    model = attlas.ConvNet(attlas.ConvNetConfig(
        num_channels=1, num_labels=10, hidden_sizes=[16, 32], depths=[1, 1], attention=attention,
    ))  # fmt: skip
    adam = torch.optim.AdamW(model.parameters())
    plan = torch.optim.lr_scheduler.OneCycleLR(
        adam, 0.02, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    rng = torch.Generator().manual_seed(100 + seed)
    for _ in range(steps):
        batch = task.draw(rng, rows)
        loss = model(batch["pixel_values"], labels=batch["targets"]).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        plan.step()
    return _judged(model.eval(), *task.placed(torch.Generator().manual_seed(7), 512, "test"))


@torch.no_grad()
def _judged(
    model: nn.Module, pixels: Tensor, classes: Tensor, corners: Tensor
) -> tuple[float, list[float]]:
    gates: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, ELA):
            module.register_forward_pre_hook(lambda ela, given: gates.append(ela.gate(given[0])))
    accuracy = (model(pixels).logits.argmax(-1) == classes).double().mean().item()
    found = []
    for gate in gates:
        over = pixels.shape[-1] // gate.shape[-1]
        peak = gate.mean(1).flatten(1).argmax(-1)
        at = torch.stack((peak // gate.shape[-1], peak % gate.shape[-1]), -1) * over + over / 2
        inside = (at >= corners) & (at < corners + SIDE)
        found.append(inside.all(-1).double().mean().item())
    return accuracy, found


def test_in_a_residual_network_it_keeps_accuracy_and_localises_digits():
    """Means over three seeds after 150 steps of 64 images. Measured in float32 on one thread: accuracy
    0.473 against 0.294 without attention, peaks of the last block on the digit in 89 % (68, 100, 98); on
    two threads 0.464 against 0.301, and 95 % (85, 100, 99)."""
    found = {
        name: [trained(name, seed, steps=150, rows=64) for seed in SEEDS]
        for name in ("none", "ela-efficient-local")
    }
    accuracy = {name: sum(a for a, _ in runs) / len(SEEDS) for name, runs in found.items()}
    assert accuracy["ela-efficient-local"] > accuracy["none"] > 0.15
    last = [shares[-1] for _, shares in found["ela-efficient-local"]]
    assert sum(last) / len(SEEDS) > 0.8
