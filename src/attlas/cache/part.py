"""What every part that deals with a cache has in common: learn from the prompt, then compress.

The prompt is the first call on an empty cache. Its attention is exact; right after it, layer by layer,
every part *compresses*: a policy drops keys, a quantiser encodes what is left, a selection summarises
what it will choose from. Parts compress in the order in which they were given, so each works on what
those before it left.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any, ClassVar, Literal

from torch import nn

from attlas.attach.call import Call, ForwardPass
from attlas.attach.part import Part
from attlas.cache.rotations import look, rotation_of
from attlas.catalog.kinds import CACHE, Kind
from attlas.errors import UserError
from attlas.hf.caches import DynamicLayer, fresh_layers, windows
from attlas.hf.sources import caching, own_cache
from attlas.storage.body import Body
from attlas.storage.layer import LayerState, StoredLayer, Taken
from attlas.storage.rows import Rows

#: Hooks that work in Python on every call.
_EVERY_CALL = (
    "position", "values", "score_mod", "mask", "normalize", "output", "attend", "select", "stream",
    "project",
)  # fmt: skip

#: What a part does with a cache; at most one part of each role works on one, in this order.
Role = Literal["evict", "quantize", "select"]
ROLES: tuple[Role, ...] = ("evict", "quantize", "select")


class CachePart(Part):
    """Base of the parts that deal with a cache. A subclass gives `compress`, and `learn` when it asks."""

    kind: ClassVar[Kind] = CACHE
    #: Evict, quantize or select.
    role: ClassVar[Role]
    #: Roles of other parts that this one can work together with on one cache.
    joins: ClassVar[tuple[Role, ...]] = ()
    #: The part undoes or changes the model's rotations.
    rotates = False
    #: It needs one rotation for the whole context: what it un-rotates stays for later calls.
    one_rotation = False
    #: The part works on whatever a layer caches: also on latents of which the model makes keys.
    latents = False
    #: The prompt's own attention is the model's.
    exact_prefill = True
    #: Options with which the part changes nothing, which the contract checks; None where there are none.
    everything: ClassVar[dict[str, Any] | None] = None

    @property
    def name(self) -> str:
        """Under which a cache remembers what this part knows of it."""
        return type(self).__name__

    # What a part defines.

    def learn(self, state: LayerState, call: Call) -> None:
        """Gather statistics from a call of the layer, prompt or later."""

    def compress(self, layer: StoredLayer, state: LayerState, rows: Rows) -> None:
        """The prompt is over: do with the layer what the part is for.

        Args:
            layer: what the parts before this one left.
            state: what was learned.
            rows: which of the tokens seen are valid.
        """
        raise NotImplementedError

    def later(self, layer: StoredLayer, state: LayerState, call: Call) -> None:
        """A call after the prompt has been attended to."""

    def continued(self) -> CachePart:
        """The part as it keeps its promise after every call, as `attach(while_decoding=True)` asks.

        Quantisers and selections go on by themselves.

        Raises:
            ValueError: it works on the prompt alone.
        """
        if "while_decoding" in type(self).declared_options:
            other = copy(self)
            other.while_decoding = True  # type: ignore[attr-defined]
            return other
        if self.role == "evict":
            raise UserError(
                f"{type(self).__name__} evicts from the prompt alone and cannot hold a budget while "
                "decoding; snapkv, pyramid-kv, streaming-llm, tova, expected-attention, "
                "key-norm-eviction, q-filters and observed-attention can"
            )
        return self

    @property
    def rewinds(self) -> bool:
        """Whether nothing is done after the prompt that could not be taken back."""
        return super().rewinds and type(self).later is CachePart.later

    @property
    def captures(self) -> bool:
        """Parts that do nothing after the prompt."""
        return type(self).later is CachePart.later and self._silent()

    def _silent(self, *but: str) -> bool:
        """Whether it defines no hook of every call but these."""
        names = [name for name in _EVERY_CALL if name not in but]
        changed = any(getattr(type(self), name) is not getattr(Part, name) for name in names)
        return not changed and type(self).observe is CachePart.observe and not self.points

    # How attach uses it.

    def check_beside(self, others: list[Part]) -> None:
        """Refuse parts that cannot work on one cache with this one."""
        if all(isinstance(part, CachePart) for part in others):
            check_together([part for part in others if isinstance(part, CachePart)])
        else:
            super().check_beside(others)

    def check(self, model: nn.Module) -> None:
        """Refuse models without full attention, with caches or rotations that the part cannot use."""
        if (own := own_cache(model)) is not None:
            raise UserError(
                f"{type(self).__name__} works on a DynamicCache; {type(model).__name__} takes no "
                f"cache but its own {own}"
            )
        layers = self.fresh_layers(model)
        full = [i for i, layer in enumerate(layers) if _is_full(layer)]
        if not full:
            raise UserError(
                f"{type(self).__name__} works on full-attention layers; "
                f"{type(model).__name__} has none with a growing cache"
            )
        self._check_cached(model, full)
        if self.rotates:
            look(model)
            self.states(layers, model)

    def _check_cached(self, model: nn.Module, full: list[int]) -> None:
        """Refuse layers whose cache does not hold what attention reads."""
        for number, (kind, module) in caching(model, full).items():
            if kind == "turns":
                why = "is run several times in a pass and fills several layers of the cache"
            elif kind == "parts":
                why = "attends several times in a pass, each time to a part of what it caches"
            elif kind == "latents" and not self.latents:
                why = "caches something else, of which it makes them in every call"
            else:
                continue
            raise UserError(
                f"{type(self).__name__} works on the keys and values that attention reads; layer "
                f"{number} of {type(model).__name__} ({type(module).__name__}) {why}"
            )

    @staticmethod
    def fresh_layers(model: Any) -> list[Any]:
        """The layers that an empty cache of this model comes with."""
        return fresh_layers(model)

    def states(self, layers: list[Any], model: nn.Module) -> dict[int, LayerState]:
        """An empty state for each full-attention layer among an empty cache's layers."""
        full = tuple(i for i, layer in enumerate(layers) if _is_full(layer))
        latent = {i for i, (kind, _) in caching(model, full).items() if kind == "latents"}
        states = {i: LayerState(i, full, windows(layers), latent=i in latent) for i in full}
        for number, state in states.items() if self.rotates else ():
            state.rotation = rotation_of(
                model, number, type(self).__name__, one=self.one_rotation
            )
            state.rotary = None if state.rotation is None else state.rotation.now()
        return states

    def cache_layers(self, layers: list[Any], model: nn.Module) -> list[Any]:
        """Stored layers in place of the full-attention ones; sliding windows stay."""
        states = self.states(layers, model)
        found = []
        for number, layer in enumerate(layers):
            if number in states:
                layer = layer if isinstance(layer, StoredLayer) else StoredLayer()
                layer.learned[self.name] = states[number]
            found.append(layer)
        return found

    def resume(self, layers: list[Any], model: nn.Module) -> None:
        """Go on with a cache that was made, forked or loaded before this session.

        Raises:
            ValueError: the cache does not know this part, which needs to have seen the prompt.
        """
        for number, state in self.states(layers, model).items():
            layer = layers[number]
            if not isinstance(layer, StoredLayer):
                continue
            known = layer.learned.get(self.name)
            if known is None and self.role == "select":
                raise UserError(
                    f"{type(self).__name__} did not see the prompt of this cache; read it inside "
                    "attach, or with prefill(model, input_ids, [part])"
                )
            if known is not None:
                known.full, known.windows = state.full, state.windows
                known.rotary, known.rotation = state.rotary, state.rotation

    @staticmethod
    def take_note(state: LayerState, call: Call) -> None:
        """What every part is to know of a call before it learns from it."""
        state.scaling = call.scaling
        if state.rotation is not None:
            state.rotary = state.rotation.now()

    def begin(self, forward_pass: ForwardPass) -> None:
        """In a chunked prompt, the first single token ends it: now the layers are compressed."""
        if not forward_pass.ended or forward_pass.cache is None:
            return
        for layer in forward_pass.cache.layers:
            if isinstance(layer, StoredLayer) and not layer.compressed:
                self.compress(layer, layer.learned[self.name], layer.rows(forward_pass.valid))

    def observe(self, call: Call) -> None:
        """Learn from a call, and compress when it is the prompt's."""
        layer = call.cache_layer
        if not isinstance(layer, StoredLayer) or self.name not in layer.learned:
            return
        state = layer.learned[self.name]
        self.take_note(state, call)
        if layer.compressed:
            self.later(layer, state, call)
            return
        self.learn(state, call)
        if not call.forward_pass.chunked:
            self.compress(layer, state, call.rows)


def absorb(
    layer: StoredLayer,
    rows: Rows,
    encode: Callable[[Taken], dict[str, Body]],
    *,
    recent: int,
    block: int,
) -> None:
    """Turn all but the newest tokens of each row into bodies, a whole number of blocks.

    Rows are counted each by its own tokens, so that padding changes nothing.

    Args:
        layer: whose dense slots are taken.
        rows: which of the tokens seen are valid.
        encode: makes bodies, by name, of what was taken.
        recent: newest tokens that stay dense.
        block: tokens of a block.
    """
    if layer.dense_slots - recent < block:
        return
    counts = [max(0, held - recent) // block * block for held in layer.lengths(rows)]
    if max(counts, default=0):
        for name, body in encode(layer.take(counts, rows)).items():
            layer.put(name, body)


def _is_full(layer: Any) -> bool:
    return type(layer) in (DynamicLayer, StoredLayer)


def check_together(parts: list[CachePart]) -> None:
    """Refuse parts that cannot work on one cache, or in this order.

    Raises:
        ValueError: two parts of one role, or parts that do not go together, by name.
    """
    for before, after in ((a, b) for i, a in enumerate(parts) for b in parts[i + 1 :]):
        names = f"{type(before).__name__} and {type(after).__name__}"
        if before.role == after.role:
            raise UserError(f"only one part can {before.role}, got {names}")
        if after.role not in before.joins or before.role not in after.joins:
            raise UserError(
                f"{names} cannot work on one cache: one would {before.role} and the other "
                f"{after.role} what they both need to own"
            )
        again = next((p for p in (before, after) if getattr(p, "while_decoding", False)), None)
        if again is not None:
            raise UserError(
                f"while_decoding of {type(again).__name__} drops keys after every call, which it can "
                f"only where it alone holds the cache; {names} share one"
            )
        if ROLES.index(before.role) > ROLES.index(after.role):
            raise UserError(
                f"give the part that {after.role}s before the one that {before.role}s: {names} came "
                "in the other order"
            )
