"""What layers, feature maps and position encodings have beyond `nn.Module`: constants and moving state.

| what a network holds | trained | stored | rounded | is lost on the meta device | moves in a pass |
|----------------------|---------|--------|---------|----------------------------|-----------------|
| parameter            | yes     | yes    | yes     | yes                        | no              |
| buffer               | no      | yes    | yes     | yes                        | in training     |
| constant             | no      | no     | no      | no                         | no              |

A constant follows from the options: frequencies, slopes, decays, the directions of a hash.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

F = TypeVar("F", bound=Callable[..., Any])

#: Passes whose state is remembered until the backward pass computes them again.
PASSES = 16
#: Numbers of a pass's inputs by which it is known again.
TRACE = 64


class Network(nn.Module):
    """A module whose constants are always there, and whose copies have no graph."""

    #: What the last training pass adds to the loss, already weighted; a model sums its networks'.
    auxiliary_loss: Tensor | None = None

    def hold(self, name: str, make: Callable[[], Tensor]) -> None:
        """Make a constant and keep it as the attribute `name`.

        It is no buffer: it is made with real numbers where the module is made on the meta device, goes
        where the module goes, and keeps its precision. Rounded to bfloat16, an angle at token 1000
        would be off by half a turn.
        """
        here = torch.empty(0).device
        with torch.inference_mode(False), torch.device("cpu"):
            value = make()
        setattr(self, name, value if here.type == "meta" else value.to(here))
        self._held = tuple(dict.fromkeys((*self.held, name)))

    @property
    def held(self) -> tuple[str, ...]:
        """Names of its constants."""
        return getattr(self, "_held", ())

    def _place(self, device: torch.device) -> None:
        """Constants to a device; on meta they would be lost."""
        if device.type != "meta":
            with torch.inference_mode(False):
                for name in self.held:
                    setattr(self, name, getattr(self, name).to(device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Network:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in self.held[:1]:
            self._place(fn(getattr(self, name).new_empty(0)).device)
        return self

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any],
        *rest: Any,
    ) -> None:  # fmt: skip
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        loaded = [t for name, t in state_dict.items() if name.startswith(prefix)]
        if loaded and local_metadata.get("assign_to_params_buffers", False):
            for module in self.modules():
                if isinstance(module, Network):
                    module._place(loaded[0].device)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has made no training pass, whose loss and its graph would go with it.
        return {n: v for n, v in self.__dict__.items() if n not in ("auxiliary_loss", "_passes")}


# State that moves in a training pass -------------------------------------------------------------------


class Pass(NamedTuple):
    """What a training pass found: some numbers of its inputs, its buffers, and whether it had a graph."""

    trace: Tensor
    buffers: dict[tuple[nn.Module, str], Tensor]
    graph: bool


def moving(method: F) -> F:
    """A method of a network, of (..., inputs) or of (x), that moves buffers in training.

    Activation checkpointing computes a pass again during the backward pass. Then the method sees the
    buffers that the first pass saw, and moves them no further, so that gradients are those of the first
    pass and every pass counts once.
    """

    @wraps(method)
    def run(self: Network, *args: Any) -> Any:
        if not self.training:
            return method(self, *args)
        x: Tensor = getattr(args[-1], "x", args[-1])
        # Asked for here, since the decorator alone would bring the compiler with every import of attlas.
        passed = torch.compiler.disable(_passed) if torch.compiler.is_compiling() else _passed
        return passed(self, x, lambda: method(self, *args))

    return run  # type: ignore[return-value]


def _passed(network: Network, x: Tensor, run: Callable[[], Any]) -> Any:
    held: dict[tuple[nn.Module, str], Tensor] = {
        (module, name): buffer
        for module in network.modules() for name, buffer in module.named_buffers(recurse=False)
    }  # fmt: skip
    known: deque[Pass] = network.__dict__.setdefault("_passes", deque(maxlen=PASSES))
    flat = x.detach().reshape(-1)
    trace = flat[:: max(1, len(flat) // TRACE)].clone()
    if torch._C._current_graph_task_id() == -1:  # no backward pass is under way
        before = {place: buffer.clone() for place, buffer in held.items()}
        known.append(Pass(trace, before, torch.is_grad_enabled()))
        return run()
    first = _again(network, trace, known)
    try:
        for (module, name), buffer in first.buffers.items():
            setattr(module, name, buffer.clone())
        return run()
    finally:
        for (module, name), buffer in held.items():
            setattr(module, name, buffer)


def _again(network: Network, trace: Tensor, known: deque[Pass]) -> Pass:
    """The pass that is computed again: the latest of those whose inputs come nearest.

    Raises:
        RuntimeError: it is not known any more.
    """
    alike = [one for one in reversed(known) if one.trace.shape == trace.shape]
    if not alike:
        raise RuntimeError(
            f"{type(network).__name__} is computed again in a backward pass, but its state before the "
            f"first time is only known of the last {PASSES} training passes"
        )
    apart = torch.stack([(one.trace - trace).abs().sum() for one in alike])
    return alike[int(apart.nan_to_num(nan=torch.inf).argmin())]
