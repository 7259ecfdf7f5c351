"""Fitting what a quantiser does to keys and values: gradients through the rounding of all layers.

The model reads a text twice, as it is and with every layer's past keys and values rounded, and the
constants follow the gradient of the mean absolute difference of the attention heads' outputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attlas.attach import attach
from attlas.attach.call import Call
from attlas.attach.part import Part
from attlas.calibration import Calibration
from attlas.calibration.frozen import frozen
from attlas.errors import UserError
from attlas.options import option
from attlas.storage.files import fingerprint

Constants = dict[str, Tensor]
#: What the clipping's parameter begins with: σ(4) = 0.98 of the range.
OPEN = 4.0


@runtime_checkable
class Rounding(Protocol):
    """What a fit needs to know of the part whose constants it finds: its bits, groups, steps and rate."""

    bits: int
    channel_group: int | None
    steps: int
    rate: float

    @property
    def calibration_key(self) -> str:
        """Under which the constants are kept."""


def fitted(
    part: Rounding,
    model: nn.Module,
    texts: Sequence[Tensor],
    tick: Callable[[int, int], None],
    partial: Path | None,
) -> Constants:
    """The constants `layer.k.shift`, `.scale`, `.clip` and those of values.

    Args:
        part: whose bits, group, steps and rate are used.
        model: stays as it is.
        texts: one is read in each step, in turn.
        tick: told of the steps done.
        partial: keeps all that a fit needs to go on after any step.
    """
    device = next(model.parameters()).device
    texts = [t.to(device) for t in texts]
    key = f"{part.calibration_key} {part.steps} {part.rate} {_digest(texts)}"
    known = _resumed(partial, key, model)
    state = known.tensors if known else _moments(begun(model, texts))
    done = int(known.about["done"]) if known else 0
    state = {name: t.to(device) for name, t in state.items()}
    tick(done, part.steps)
    for step in range(done, part.steps):
        text = texts[step % len(texts)]
        _follow(part, model, text, state, step)
        if partial is not None:
            Calibration(key, fingerprint(model), state, {"done": step + 1}).save(partial)
        tick(step + 1, part.steps)
    return finished({n: t for n, t in state.items() if not n.endswith(("first", "second"))})


def finished(raw: Constants) -> Constants:
    """Constants as the part uses them, from those that gradients change."""
    change = {"shift": lambda t: t, "scale": torch.exp, "clip": torch.sigmoid}
    return {name: change[name.rsplit(".", 1)[1]](t) for name, t in raw.items()}


@torch.no_grad()
def begun(model: nn.Module, texts: Sequence[Tensor]) -> Constants:
    """Where a fit begins: the middle of each channel's range, the root of half its width."""
    watch = _Ranges()
    with attach(model, watch):
        for text in texts:
            model(text, use_cache=False, logits_to_keep=1)
    raw: Constants = {}
    for name, (low, high) in watch.found.items():
        half = ((high - low) / 2).clamp(min=1e-6)
        raw[f"{name}.shift"] = (high + low) / 2
        raw[f"{name}.scale"] = half.sqrt().log()
        raw[f"{name}.clip"] = torch.full_like(half[:, :1], OPEN)
    return raw


class _Ranges(Part):
    """Least and greatest number of every channel of keys and values."""

    def setup(self) -> None:
        self.found: dict[str, tuple[Tensor, Tensor]] = {}

    def observe(self, call: Call) -> None:
        for which, x in (("k", call.k), ("v", call.v)):
            low, high = (f(x.float(), dim=(0, 2)) for f in (torch.amin, torch.amax))
            name = f"{call.layer}.{which}"
            if name in self.found:
                low = torch.minimum(low, self.found[name][0])
                high = torch.maximum(high, self.found[name][1])
            self.found[name] = (low, high)


class Rounded(Part):
    """Attention to a rounded past, differentiable in the constants; remembers what heads give."""

    part: Rounding | None = option(
        "the part whose codes are imitated; None leaves attention as it is", kw_only=False
    )
    constants: Constants = option("constants as that part uses them", kw_only=False)

    def setup(self) -> None:
        """No layer has been seen yet."""
        self.outputs: dict[int, Tensor] = {}

    def attend(self, call: Call) -> Float[Tensor, "batch query heads value_dim"] | None:
        """Causal attention in which a query sees its own token as it is and earlier ones rounded."""
        if self.part is None or f"{call.layer}.k.shift" not in self.constants:
            return None
        groups = call.groups
        keys, values = (self._coded(call, n, x) for n, x in (("k", call.k), ("v", call.v)))
        k, v, keys, values = (
            t.repeat_interleave(groups, dim=1) for t in (call.k, call.v, keys, values)
        )
        own = (call.q * k).sum(dim=-1) * call.scaling
        scores = call.q @ keys.transpose(-1, -2) * call.scaling
        scores = torch.where(_eye(scores), own[..., None], scores)
        seen = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
        if call.mask is not None:
            seen = seen & call.mask
        weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1, dtype=torch.float32)
        weights = weights.to(values.dtype)
        mixed = weights @ values
        mixed = mixed + weights.diagonal(dim1=-2, dim2=-1)[..., None] * (v - values)
        return mixed.transpose(1, 2)

    def output(
        self, call: Call, heads: Float[Tensor, "batch query heads value_dim"]
    ) -> Float[Tensor, "batch query heads value_dim"]:
        """Remember what a layer's heads give."""
        self.outputs[call.layer] = heads
        return heads

    def _coded(self, call: Call, which: str, x: Tensor) -> Tensor:
        assert self.part is not None
        shift, scale, clip = (
            self.constants[f"{call.layer}.{which}.{what}"] for what in ("shift", "scale", "clip")
        )
        group = self.part.channel_group or x.shape[-1]
        y = (x.float() - shift[:, None]) / scale[:, None]
        y = rounded(narrowed(y, clip, group), self.part.bits, group)
        return (y * scale[:, None] + shift[:, None]).to(x.dtype)


def narrowed(
    y: Float[Tensor, "batch heads tokens dim"], clip: Float[Tensor, "heads 1"], group: int
) -> Float[Tensor, "batch heads tokens dim"]:
    """Numbers clamped to the middle share `clip` of their token's and group's range."""
    parts = y.unflatten(-1, (-1, group))
    low, high = parts.amin(dim=-1, keepdim=True), parts.amax(dim=-1, keepdim=True)
    middle, half = (high + low) / 2, (high - low) / 2 * clip[:, None, None]
    inside: Tensor = torch.minimum(torch.maximum(parts, middle - half), middle + half).flatten(-2)
    return inside


def rounded(
    y: Float[Tensor, "batch heads tokens dim"], bits: int, group: int
) -> Float[Tensor, "batch heads tokens dim"]:
    """What codes of numbers stand for; gradients go through the rounding as if it were not there."""
    if bits == 16:
        return y
    parts = y.unflatten(-1, (-1, group))
    low, high = parts.amin(dim=-1, keepdim=True), parts.amax(dim=-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(min=1e-12)
    exact = (parts - low) / step
    codes = exact + (exact.round() - exact).detach()
    found: Tensor = (codes * step + low).flatten(-2)
    return found


def loss(part: Rounding, model: nn.Module, text: Tensor, constants: Constants) -> Tensor:
    """Sum over layers of the relative mean absolute error of the heads' outputs."""
    plain = Rounded(None, {})
    with torch.no_grad(), attach(model, plain):
        model(text, use_cache=False, logits_to_keep=1)
    coded = Rounded(part, constants)
    with attach(model, coded):
        model(text, use_cache=False, logits_to_keep=1)
    errors = [
        (coded.outputs[i] - o).abs().mean() / o.abs().mean().clamp(min=1e-12)
        for i, o in plain.outputs.items()
    ]
    return torch.stack(errors).sum()


def _follow(part: Rounding, model: nn.Module, text: Tensor, state: Constants, step: int) -> None:
    """One step of Adam; the model's own weights get no gradients."""
    raw = {n: t for n, t in state.items() if not n.endswith(("first", "second"))}
    with torch.enable_grad(), frozen(model):
        leaves = {name: t.detach().requires_grad_() for name, t in raw.items()}
        gradients = torch.autograd.grad(
            loss(part, model, text, finished(leaves)), list(leaves.values()), allow_unused=True
        )
    for (name, t), gradient in zip(raw.items(), gradients, strict=True):
        if gradient is None:
            continue
        first = torch.lerp(gradient, state[f"{name}.first"], 0.9)
        second = torch.lerp(gradient.square(), state[f"{name}.second"], 0.99)
        state[f"{name}.first"], state[f"{name}.second"] = first, second
        mean, spread = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.99 ** (step + 1))
        state[name] = t - part.rate * mean / (spread.sqrt() + 1e-10)


def _moments(raw: Constants) -> Constants:
    """Constants and, beside them, running means of their gradients and of the squares."""
    zeros = {f"{n}.{m}": torch.zeros_like(t) for n, t in raw.items() for m in ("first", "second")}
    return raw | zeros


def _eye(scores: Tensor) -> Bool[Tensor, "queries keys"]:
    return torch.eye(*scores.shape[-2:], dtype=torch.bool, device=scores.device)


def _resumed(partial: Path | None, key: str, model: nn.Module) -> Calibration | None:
    """What an interrupted fit left; None where it was another, or there is none."""
    if partial is None or not partial.exists():
        return None
    try:
        found = Calibration.load(partial)
        found.check(key, model, str(partial))
    except UserError:
        return None
    return found


def _digest(texts: Sequence[Tensor]) -> str:
    numbers = torch.cat([t.flatten() for t in texts]).to(torch.int64).cpu()
    return hashlib.sha256(numbers.numpy().tobytes()).hexdigest()[:16]
