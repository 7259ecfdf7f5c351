"""`generate` of a model of ours without a session: its steps are captured all the same.

For as long as a `generate` runs, the model has a session without parts, which changes nothing of what it
gives. Several threads that generate with one model share it; the last that ends takes it away.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from attlas.attach import capturing
from attlas.attach.session import Session, attach
from attlas.attach.state import ATTACHED

#: The sessions under way, and how many threads each has.
_sessions: WeakKeyDictionary[nn.Module, tuple[Session, int]] = WeakKeyDictionary()
_turn = threading.Lock()


@contextmanager
def steps_captured(model: Any) -> Iterator[None]:
    """A session without parts around a `generate` of the model, where its steps may be captured."""
    with _turn:
        session, threads = _sessions.get(model, (None, 0))
        if session is None and _may(model):
            session = attach(model).__enter__()
        if session is not None:
            _sessions[model] = session, threads + 1
    try:
        yield
    finally:
        if session is not None:
            _leave(model, session)


def _leave(model: Any, session: Session) -> None:
    with _turn:
        threads = _sessions[model][1] - 1
        if threads:
            _sessions[model] = session, threads
        else:
            del _sessions[model]
            session.__exit__(None, None, None)


def _may(model: Any) -> bool:
    """Whether a session could capture steps here, and nothing of the user's is in its way: a session of
    theirs, a `forward` that they put in place of the model's, what they compiled."""
    if capturing.device_refuses(model.device) is not None:
        return False
    modules = list(model.modules())
    return not any(
        module in ATTACHED or "forward" in vars(module) or module._compiled_call_impl is not None
        for module in modules
    )
