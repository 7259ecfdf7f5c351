"""What is known of an attached model: its parts by hook, its layers, the call under way."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from attlas.attach.call import ForwardPass
from attlas.attach.part import Part, Recorder
from attlas.hf.sources import shared_keys

#: The attachment of each attention module of the models attached now.
ATTACHED: dict[nn.Module, Attachment] = {}
#: Hooks that look at keys, or at scores of keys, one by one.
KEY_HOOKS = ("position", "score_mod", "mask", "normalize")


class Attachment:
    """A model and the parts on it.

    Attributes:
        model: what was attached to.
        parts: in the order given, recorders last.
        layers: the layer that each module of the model belongs to.
        sources: of each layer without keys of its own, the layer whose keys it reads.
        last_readers: of each layer whose keys others read, the last of these.
        cache: the Transformers cache of the model's last call.
        forward_pass: the forward call under way.
        prompt: tokens of the prompt of a `generate` under way, where that is known.
        assisted: it drafts candidates and takes back those that are wrong.
        read: the cache of the last call that ended, and how many tokens it had seen then.
        undo: what takes the attachment back, last first.
    """

    def __init__(self, model: nn.Module, parts: Iterable[Part], chunked: bool) -> None:
        self.model, self.parts, self.chunked = model, tuple(parts), chunked
        self.layers: dict[nn.Module, int] = {}
        self.sources = shared_keys(model)
        self.last_readers = {source: reader for reader, source in sorted(self.sources.items())}
        self.cache: Any = None
        self.forward_pass: ForwardPass | None = None
        self.prompt: int | None = None
        self.assisted = False
        self.read: tuple[Any, int] | None = None
        self.undo: list[Callable[[], Any]] = []
        self.keepers = self.overriding("cache_layers")
        self._hooks = {
            hook: self.overriding(hook)
            for hook in (*KEY_HOOKS, "select", "attend", "output", "observe", "project", "stream")
        }
        self.recorders = [
            p for p in self.parts if isinstance(p, Recorder) and _overrides(p, "update", Recorder)
        ]
        self.plain = not self.parts
        #: The call under way needs nothing of ours: no part, and a cache that Transformers can read.
        self.direct = self.plain
        #: By cache, the column of the first token whose position id is known, and these ids.
        self._positions: WeakKeyDictionary[Any, tuple[int, Tensor]] = WeakKeyDictionary()

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
        """Position ids of a call's tokens, behind those of the calls before it."""
        known = (
            own[..., :0] if forward_pass.earlier is None else forward_pass.earlier.to(own.device)
        )
        rows = max(known.shape[0], own.shape[0])
        whole = torch.cat([known.expand(rows, -1), own.expand(rows, -1)], dim=1)
        self._positions[self.cache] = (forward_pass.offset - known.shape[1], whole)


def _overrides(part: Part, hook: str, base: type) -> bool:
    return getattr(type(part), hook) is not getattr(base, hook)
