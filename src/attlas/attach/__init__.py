"""attach: parts on a pretrained model, through the model's own attention.

    with attlas.attach(model, SnapKV(keep=0.5), record=["entropy"]) as session:
        model.generate(**inputs)
    session["entropy"]

One attention function and one mask function are registered with Transformers while a session is
open; each call of a layer's attention becomes a `Call`, which every part may look at and change at
its own stage. Leaving the block restores the model and Transformers' registries to what they were.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from attlas.attach.call import Call, Part, Recorder, Selector, Step
from attlas.attach.session import Session, attach
from attlas.positions import ScoreMod

if TYPE_CHECKING:
    from attlas.cache.prompt import Prompt, prefill

__all__ = [
    "Call",
    "Part",
    "Prompt",
    "Recorder",
    "ScoreMod",
    "Selector",
    "Session",
    "Step",
    "attach",
    "prefill",
]


class _Callable(ModuleType):
    """This package stands in `attlas` under the name of its function, so it can be called as it."""

    __call__ = staticmethod(attach)


sys.modules[__name__].__class__ = _Callable


def __getattr__(name: str) -> Any:
    # Parts import attach, so what is built of parts is looked up when it is asked for.
    if name in ("Prompt", "prefill"):
        from attlas.cache import prompt

        return getattr(prompt, name)
    raise AttributeError(f"module 'attlas.attach' has no attribute {name!r}")
