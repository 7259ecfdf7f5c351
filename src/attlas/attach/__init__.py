"""attach: parts on a pretrained model, through the model's own attention.

    with attlas.attach(model, SnapKV(keep=0.5), record=["entropy"]) as session:
        model.generate(**inputs)
    session["entropy"]

One attention function and one mask function are registered with Transformers while a session is
open, and layers of our own have a door; each call of a layer's attention becomes a `Call`, which every
part may look at and change at its own stage. Leaving the block restores the model and Transformers'
registries to what they were.
"""

import sys
from types import ModuleType

from attlas.attach.call import Call, ForwardPass, Site
from attlas.attach.part import Part, Patch, Recorder, Selector, Steerer
from attlas.attach.session import Session, attach
from attlas.attach.where import find_span
from attlas.positions import ScoreMod

__all__ = [
    "Call",
    "ForwardPass",
    "Part",
    "Patch",
    "Recorder",
    "ScoreMod",
    "Selector",
    "Session",
    "Site",
    "Steerer",
    "attach",
    "find_span",
]


class _Callable(ModuleType):
    """This package stands in `attlas` under the name of its function, so it can be called as it."""

    __call__ = staticmethod(attach)


sys.modules[__name__].__class__ = _Callable
