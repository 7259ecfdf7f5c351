"""What a captured step is made with: recording, fusing, and a look at the model before each run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from operator import is_
from typing import Any

import torch
from torch import nn

from attlas.hf import interface

#: Programs that one process may compile of one function, for models of several kinds: a layer may need
#: some of its own.
PROGRAMS = 256


def recorded(
    step: Callable[[], Any], device: torch.device
) -> tuple[Any, Callable[[], Any] | str]:
    """(what a step gives now; what runs it again and gives the same tensors filled anew, or why not)."""
    with torch.cuda.device(device):
        current, side = torch.cuda.current_stream(), _side(device, threading.get_ident())
        side.wait_stream(current)
        with torch.cuda.stream(side):
            now = step()  # kernels are compiled and workspaces made
        current.wait_stream(side)
        graph, broke = torch.cuda.CUDAGraph(), None
        try:
            # On the stream of the first step: what products work in was made there, outside of the graph.
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                try:
                    again = step()
                except Exception as error:  # the capture's end has an error of its own, which tells less
                    broke = error
                    raise
        except Exception as error:  # whatever it is, the step itself has run
            _forget_capture(side)
            return now, reason_of(broke or error)

    def run() -> Any:
        with torch.cuda.device(device):
            graph.replay()
        return again

    return now, run


@cache
def _side(device: torch.device, thread: int) -> torch.cuda.Stream:
    """A thread's stream for first steps and captures: products work in one place for each, which no other
    thread's steps write to meanwhile."""
    return torch.cuda.Stream(device)


def _forget_capture(side: torch.cuda.Stream) -> None:
    """Capture something that can be: after a capture that failed PyTorch 2.11 draws no random number."""
    nothing, graph = torch.zeros(1, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        nothing.add_(1)


def reason_of(error: Exception) -> str:
    """An error in one line."""
    return str(error).partition("\n")[0] or type(error).__name__


def fused(model: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """A model's forward, each stretch between two attentions as few kernels.

    One program serves all layers: their numbers are no constants of it. What rounds in eager PyTorch
    rounds here too.
    """
    compiled = torch.compile(forward, options={"emulate_precision_casts": True})
    settings: dict[str, Any] = {
        "suppress_errors": False, "allow_unspec_int_on_nn_module": True, "recompile_limit": PROGRAMS,
    }  # fmt: skip

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(**settings), interface.plainly(model):
            return compiled(*args, **kwargs)

    return run


class Snapshot:
    """The modules of a model and where their weights lie, to be looked at before every step."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._children = [(m._modules, tuple(m._modules.values())) for m in modules if m._modules]
        self._weights = [
            (held, name, weight.data_ptr())
            for m in modules for held in (m._parameters, m._buffers) for name, weight in held.items()
            if weight is not None
        ]  # fmt: skip

    @property
    def same(self) -> bool:
        """Whether all are there, at the same places."""
        return all(
            len(now) == len(then) and all(map(is_, now.values(), then)) for now, then in self._children
        ) and all(
            (now := held.get(name)) is not None and now.data_ptr() == at
            for held, name, at in self._weights
        )
