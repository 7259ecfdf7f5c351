"""What is known of an attached model: its parts by hook, its layers, the call under way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from attlas.attach.call import ForwardPass
from attlas.attach.part import Part, Patch, Recorder
from attlas.attach.towers import NOWHERE, Tower
from attlas.attach.under import Under
from attlas.errors import UserError
from attlas.hf.sources import shared_keys

#: The attachment of each attention module of the models attached now.
ATTACHED: dict[nn.Module, Attachment] = {}
#: Hooks that look at keys, or at scores of keys, one by one.
KEY_HOOKS = ("position", "values", "score_mod", "mask", "normalize")
#: Why a part cannot work in a call that was not announced.
OUTSIDE = (
    "a part needs the model's own call: use model(...), not model.forward(...), and no gradient "
    "checkpointing but Transformers' own"
)


class Here(threading.local):
    """What is under way in one thread.

    Attributes:
        under: the forward call.
        around: the arguments of the models around the tower whose calls are under way.
        until: tokens seen at which a prompt ends that is read in pieces; None where none is.
        done: what the first of several calls that are made in place of one gave.
    """

    def __init__(self) -> None:
        self.under: Under | None = None
        self.around: dict[nn.Module, dict[str, Any]] = {}
        self.until: int | None = None
        self.done: list[Any] = []


class Attachment:
    """A model and the parts on it.

    Attributes:
        tower: what of the model is attached to.
        model: the model that parts are shown, see `Tower.model`.
        parts: in the order given, recorders last.
        own: the layers are attlas's own, whose numbers are always known.
        sources: of each layer without keys of its own, the layer whose keys it reads.
        last_readers: of each layer whose keys others read, the last of these.
        cache: the Transformers cache of the model's last call.
        caches: those that this session has taken on.
        threads: the threads in which a forward call is under way, and the thread of the last.
        attended: numbers of the layers that have attended.
        prompt: tokens of the prompt of a `generate` under way, where that is known.
        assisted: it drafts candidates and takes back those that are wrong.
        read: the cache of the last call that ended, and how many tokens it had seen then.
        captures: steps of one token may be captured.
        undo: what takes the attachment back, last first; empty unless the model is attached.
    """

    def __init__(self, tower: Tower, parts: Iterable[Part], chunked: bool) -> None:
        self.tower, self.parts, self.chunked = tower, tuple(parts), chunked
        self.model: nn.Module = tower.model
        self.own = False
        self.sources = shared_keys(tower.module)
        self.last_readers = {source: reader for reader, source in sorted(self.sources.items())}
        self.cache: Any = None
        self.caches: WeakSet[Any] = WeakSet()
        self.threads: set[int] = set()
        self.last_thread: int | None = None
        self.attended: set[int] = set()
        self.prompt: int | None = None
        self.assisted = False
        self.read: tuple[Any, int] | None = None
        self.captures = False
        self.undo: list[Callable[[], Any]] = []
        self.here = Here()
        self.keepers = self.overriding("cache_layers")
        self._hooks = {
            hook: self.overriding(hook)
            for hook in (*KEY_HOOKS, "select", "attend", "output", "observe", "project", "stream")
        }
        self.recorders = [
            p for p in self.parts if isinstance(p, Recorder) and _overrides(p, "update", Recorder)
        ]
        self.plain = not self.parts
        #: Parts that keep something of one sequence themselves, beside what its cache keeps.
        self.keeping = [p for p in self.parts if p not in self.keepers and _keeps(p)]
        #: By cache, the column of the first token whose position id is known, and these ids.
        self._positions: WeakKeyDictionary[Any, tuple[int, Tensor]] = WeakKeyDictionary()

    @property
    def under(self) -> Under | None:
        """The forward call under way in this thread."""
        return self.here.under

    @under.setter
    def under(self, under: Under | None) -> None:
        self.here.under = under

    @property
    def around(self) -> dict[nn.Module, dict[str, Any]]:
        """The arguments of the models around the tower whose calls are under way in this thread."""
        return self.here.around

    @property
    def forward_pass(self) -> ForwardPass | None:
        """What parts are told of that call."""
        return None if self.under is None else self.under.forward_pass

    @property
    def direct(self) -> bool:
        """Whether the call needs nothing of ours."""
        return self.plain if self.under is None else self.under.direct

    @property
    def again(self) -> bool:
        """Whether what is computed was computed before, and is only needed for its gradients."""
        return self.under is not None and self.under.again

    def at(self, module: nn.Module) -> tuple[int, ForwardPass] | None:
        """(layer, forward call) that a module attends in; None for one that is no layer of the tower.

        Raises:
            ValueError: no forward call is under way, or the layer cannot be told.
        """
        if module in self.tower.aside or module not in self.tower.layers:
            return None
        if self.under is None:
            raise UserError(OUTSIDE)
        number = self.tower.layers[module] if self.own else self.under.number(module, self.tower)
        if number is None:
            return None
        self.attended.add(number)
        return number, self.under.forward_pass

    def overriding(self, hook: str) -> list[Part]:
        """The parts that define a hook."""
        return [p for p in self.parts if _overrides(p, hook, Part)]

    def with_hook(self, hook: str, layer: int) -> list[Part]:
        """The parts that define a hook and are about a layer."""
        return [p for p in self._hooks[hook] if p.where.covers(layer)]

    def recorders_of(self, layer: int) -> list[Recorder]:
        """The recorders of weights that look at a layer."""
        return [p for p in self.recorders if p.where.covers(layer)]

    def wants_keys(self, layer: int) -> bool:
        """Whether some part looks at a layer's keys one by one."""
        looks = any(self.with_hook(hook, layer) for hook in KEY_HOOKS)
        return looks or bool(self.recorders_of(layer))

    def weighs(self, layer: int) -> bool:
        """Whether the output of a layer is made from weights that a part changes or differentiates."""
        differentiated = any(p.wants_gradients for p in self.recorders_of(layer))
        return differentiated or bool(self.with_hook("normalize", layer))

    def earlier(self, cache: Any, offset: int, rows: int) -> Tensor | None:
        """Position ids that came with the last of the tokens before this call; None where none did.

        Rows that were repeated since are repeated here; of other changes of the batch nothing is known.
        """
        if cache not in self._positions:
            return None
        first, known = self._positions[cache]
        if rows % known.shape[0]:
            return None
        known = known.repeat_interleave(rows // known.shape[0], dim=0) if len(known) > 1 else known
        return known[
            ..., : max(0, offset - first)
        ]  # less than is known where tokens were taken back

    def remember(self, forward_pass: ForwardPass, own: Tensor) -> None:
        """Position ids of a call's tokens, behind those of the calls before it.

        Those of several axes (of pictures) are not kept: what asks for positions refuses them.
        """
        if own.ndim > 2:
            return
        known = (
            own[..., :0] if forward_pass.earlier is None else forward_pass.earlier.to(own.device)
        )
        rows = max(known.shape[0], own.shape[0])
        whole = torch.cat([known.expand(rows, -1), own.expand(rows, -1)], dim=1)
        self._positions[forward_pass.cache] = (forward_pass.offset - known.shape[1], whole)


def _keeps(part: Part) -> bool:
    """Whether a part may keep something from call to call."""
    hooks = [hook for hook in ("begin", "observe", "stream") if _overrides(part, hook, Part)]
    return isinstance(part, Recorder | Patch) or bool(hooks)


def _overrides(part: Part, hook: str, base: type) -> bool:
    return getattr(type(part), hook) is not getattr(base, hook)


#: What holds modules that belong to no session: no part, and no layer of its own.
NOBODY = Attachment(NOWHERE, (), chunked=False)
