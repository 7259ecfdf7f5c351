"""When a session captures a model's step, and why it does not: see `attlas.attach.captured`."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import partial, wraps
from types import MethodType
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from attlas.attach import hooks
from attlas.attach.captured import VARYING, Step
from attlas.attach.own import own_layers, unrecordable
from attlas.attach.prefill import tokens_of
from attlas.attach.recorded import reason_of
from attlas.attach.state import Attachment
from attlas.attach.under import recording
from attlas.errors import UserError
from attlas.hf.caches import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    cache_in,
    own_tokens,
)
from attlas.hf.sources import caching
from attlas.storage.layer import StoredLayer
from attlas.storage.plain import tensors
from attlas.storage.rotary import changing_with_length
from attlas.storage.still import is_full

log = logging.getLogger("attlas")

#: Steps of one token that are run as ever before one is captured, which takes as long as some of them.
AFTER = 2
#: Runs from which on a captured step was worth its capture, and how many may be worth none.
WORTH, WASTED = 2, 3
#: Arguments that change nothing of a step but what is given beside hidden states.
FORMS = {
    "output_attentions": False, "output_hidden_states": False, "return_dict": True, "use_cache": True,
}  # fmt: skip


def device_refuses(device: torch.device) -> str | None:
    """Why steps on a device cannot be captured; None where they can."""
    return None if device.type == "cuda" else f"the model is on {device}, and graphs are CUDA's"


class Capturing:
    """What a session knows of captured steps.

    Attributes:
        asked: what `attach` was given as `compile`.
        active: steps may be captured in this session.
        why_not: why the last step was not captured; None where it was.
    """

    def __init__(self, held: Attachment, asked: bool | Literal["auto"]) -> None:
        self.held, self.asked = held, asked
        self.active = False
        self.why_not: str | None = "no step of one token was run"
        self._steps: WeakKeyDictionary[Any, Step] = WeakKeyDictionary()
        self._failed: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
        self._before: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self._wasted: WeakKeyDictionary[Any, int] = WeakKeyDictionary()

    def check(self) -> None:
        """Find out whether steps may be captured in this session.

        Raises:
            ValueError: `compile=True`, and the session cannot capture any step.
        """
        reason = "compile=False" if self.asked is False else self._never()
        self.active = reason is None
        self.why_not = reason or self.why_not
        if reason is not None and self.asked is True:
            self._tell()

    def hook(self) -> list[Callable[[], Any]]:
        """Stand in the place of the tower's `forward` until it is undone."""
        if not self.active:
            return []
        base: Any = self.held.tower.module
        self._watched = Watched(base)
        own, original, kind = vars(base).get("forward"), base.forward, type(base)
        names = list(inspect.signature(original).parameters)

        @wraps(original)
        def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
            if module is not base:  # a copy that was made meanwhile
                return kind.forward(module, *args, **kwargs)
            arguments = dict(zip(names, args, strict=False)) | kwargs
            as_ever = partial(original, *args, **kwargs)
            return self._run(original, as_ever, names, arguments)

        base.forward = MethodType(torch.compiler.disable(forward, reason=hooks.REASON), base)

        def undo() -> None:
            if own is None:
                del base.forward
            else:
                base.forward = own

        return [undo]

    def _run(
        self, original: Callable[..., Any], as_ever: Callable[[], Any], names: list[str],
        arguments: dict[str, Any],
    ) -> Any:  # fmt: skip
        """What the tower gives: by a captured step, or as it runs without."""
        held = self.held
        name, given = cache_in(arguments, type(held.tower.module))
        cache = own_tokens(given)
        if held.under is None or recording() or not _one_token(arguments, cache):
            return as_ever()
        forward_pass = held.forward_pass
        assert forward_pass is not None
        step, valid = self._steps.get(cache), forward_pass.valid
        self.why_not = self._failed.get(cache) or self._not_now(
            names, arguments, cache, valid is not None
        )
        if given is not cache:
            self.why_not = "it is a decoder behind an encoder"
        if forward_pass.chunked:
            self.why_not = "the prompt goes on"
        if self.why_not is None and step is not None and step.fits(arguments, valid):
            return step(cache, arguments, valid)
        self._let_go(cache)
        if self.why_not is not None:
            return self._refused(as_ever)
        self._watched = Watched(held.tower.module)  # modules may have been added since
        self.why_not = self._never() or self._watched.why_not
        if self.why_not is not None:
            return self._refused(as_ever)
        self._before[cache] = self._before.get(cache, 0) + 1
        if self._before[cache] <= AFTER and self.asked is not True:
            self.why_not = f"the first {AFTER} steps are run as ever"
            return as_ever()
        try:
            step = Step(held, original, cache, name, arguments, valid, fuses=self.asked is True)
        except Exception as error:  # whatever a model does that cannot be recorded
            self.why_not = self._failed[cache] = reason_of(error)
            return self._refused(as_ever)
        if step.why_not is None:
            self._steps[cache] = step
        else:
            self.why_not = self._failed[cache] = step.why_not
            self._tell()
        return step.first

    def _let_go(self, cache: Any) -> None:
        """A step that fits no more; where each is let go at once, none is captured again."""
        step = self._steps.pop(cache, None)
        if step is not None and step.runs < WORTH:
            self._wasted[cache] = self._wasted.get(cache, 0) + 1
            if self._wasted[cache] > WASTED:
                self.why_not = self._failed[cache] = "what the cache holds is moved at every step"

    def _refused(self, as_ever: Callable[[], Any]) -> Any:
        self._tell()
        return as_ever()

    def _tell(self) -> None:
        if self.asked is True:
            raise UserError(f"compile=True cannot be honoured: {self.why_not}")
        log.info("a step is not captured: %s", self.why_not)

    def _never(self) -> str | None:
        """What stands against it as long as the session lasts."""
        held, base = self.held, self.held.tower.module
        if held.own and (reason := unrecordable(own_layers(base))) is not None:
            return reason
        for number, (cached, module) in caching(base, set(held.tower.layers.values())).items():
            if cached == "latents":
                continue
            return f"layer {number} ({type(module).__name__}) caches something else than keys"
        for part in held.parts:
            if not part.captures:
                return f"{type(part).__name__} works in Python on every step"
        if (kind := changing_with_length(base)) is not None:
            return f"rotations of type {kind!r} look at how long the text is"
        devices = {p.device for p in base.parameters()}
        if len(devices) != 1:
            return f"the model lies on {len(devices)} devices"
        for module in base.modules():
            if hasattr(module, "_hf_hook"):
                return "the model's weights are moved between devices"
            if hasattr(module, "_active_adapter"):
                return f"{type(module).__name__} can switch its adapters"
        return device_refuses(devices.pop())

    def _not_now(
        self, names: list[str], arguments: dict[str, Any], cache: Any, padded: bool
    ) -> str | None:
        """What stands against it in this call."""
        base = self.held.tower.module
        if torch.is_grad_enabled():
            return "gradients are wanted"
        if base.training:
            return "the model is in training mode"
        if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
            return "autocast is on"
        if "position_ids" not in names:
            return f"{type(base).__name__} counts positions itself"
        if padded and arguments.get("position_ids") is None:
            return "rows are padded, and position_ids are not given"
        mask = arguments.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            return "the attention_mask is no 2-D tensor"
        for name, value in arguments.items():
            if name in FORMS and value not in (None, FORMS[name]):
                return f"{name}={value} asks for more than hidden states"
            if isinstance(value, Tensor) and name not in (*VARYING, "attention_mask"):
                return f"{name} is given"
        if type(cache) is not DynamicCache or cache.offloading:
            return f"the cache is a {type(cache).__name__}"
        for number, layer in enumerate(cache.layers):
            reads = number in self.held.sources  # what another layer holds
            if not reads and (reason := _layer_refused(layer, padded)) is not None:
                return f"layer {number} of the cache {reason}"
        return self._watched.why_not


def _layer_refused(layer: Any, padded: bool) -> str | None:
    """Why a step cannot be recorded over a layer of the cache; None where it can."""
    if type(layer) in (DynamicLayer, StoredLayer):
        waits = getattr(layer, "learned", None) and not layer.compressed
        return "is not compressed yet" if waits else None
    if type(layer) is DynamicSlidingWindowLayer:
        if padded:
            return "is a sliding window over padded rows"
        return None if is_full(layer) else "is a sliding window that is not full yet"
    if type(layer) is LinearAttentionLayer:
        return None if any(True for _ in tensors(layer)) else "holds no states yet"
    return f"is a {type(layer).__name__}"


def _one_token(arguments: dict[str, Any], cache: Any) -> bool:
    tokens = tokens_of(arguments)
    one = tokens is not None and tokens.shape[1] == 1 and tokens.shape[0] > 0
    return one and cache is not None and int(cache.get_seq_length()) > 0


class Watched:
    """The hooks on the modules inside of a tower, to be looked at before every step."""

    def __init__(self, base: nn.Module) -> None:
        inside = [module for module in base.modules() if module is not base]
        self._hooks = [(m, found) for m in inside for found in (m._forward_hooks, m._forward_pre_hooks)]

    @property
    def why_not(self) -> str | None:
        """The module that somebody else's hooks are on; None for none."""
        for module, found in self._hooks:
            if found and any(not isinstance(hook, hooks.Hook) for hook in found.values()):
                return f"hooks are on {type(module).__name__}"
        return None
