"""What attaches to a model: `Part`, with a hook for each stage, and its five kinds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attlas.attach.call import Call, ForwardPass, Site
from attlas.attach.where import Heads, Layers, Spans, Where, rows_of
from attlas.catalog.kinds import PATCH, RECORD, SELECT, STEER, Kind
from attlas.errors import UserError
from attlas.options import Configured, option
from attlas.positions import ScoreMod
from attlas.storage.layer import Chosen

if TYPE_CHECKING:
    from attlas.kinds.analysis import Scores


class Part(Configured):
    """What attaches to a model. Override the hooks that the part needs, named by stage.

    Every hook sees a complete `Call`: keys, positions, masks and the cache's layer are known before the
    first of them runs. Hooks of several parts follow one another in the order of the parts.
    """

    #: Stages of attention that it changes beside those whose hooks it overrides.
    changes: ClassVar[tuple[str, ...]] = ()
    #: What `attlas compare` compares this part with the others of its preset at, each as it stands
    #: behind the part's name in `--methods`: "(keep=0.5)", "(bits=4)+other(keep=0.25)". Not inherited.
    comparable: ClassVar[tuple[str, ...]] = ()
    #: The preset that does: "cache", or "prefill" of parts that thin out a prompt and tell its `density`.
    preset: ClassVar[str] = "cache"
    #: Points of the residual stream that the part is shown, see `stream`.
    points = tuple[str, ...]()
    #: What is done to a prompt hangs on the call that brings it, so that it may not be cut in pieces.
    #: None: not of registered parts, whose contract looks at it; of others it is taken for granted.
    whole_prompts: ClassVar[bool | None] = None
    #: The part reads `call.hidden`, the states from which the layer makes queries, keys and values.
    wants_hidden = False
    #: The part is shown weights and calls with their gradients: those that the output is made of.
    wants_gradients = False
    #: The layers and heads that the part is about; hooks are called for these layers alone.
    where = Where()

    def check(self, model: nn.Module) -> None:
        """Look at the model before anything is changed.

        Raises:
            ValueError: the part cannot work on this model.
        """

    def check_beside(self, others: list[Part]) -> None:
        """Look at the other parts that own the cache, all of them in the order given.

        Raises:
            ValueError: they cannot work together.
        """
        if len(others) > 1:
            names = " and ".join(type(p).__name__ for p in others)
            raise UserError(f"only one part can own the cache, got {names}")

    def cache_layers(self, layers: list[Any], model: nn.Module) -> list[Any]:
        """The layers that an empty cache shall have, given those it came with.

        A layer that drops tokens tells so by `original_positions()`, the column of the sequence that
        each of its slots holds (-1 for an empty one; None while nothing is dropped), and by `ragged`,
        whether there are empty ones; it counts the tokens that it has seen, not those it holds.
        """
        return layers

    def begin(self, forward_pass: ForwardPass) -> None:
        """Called before each forward call of the model."""

    def take_back(self, seen: int) -> None:
        """All but the first `seen` tokens were taken back: by `cache.crop` or assisted decoding."""

    @property
    def rewinds(self) -> bool:
        """Whether the part is right where tokens are taken back, and several are decoded in one call."""
        return type(self).attend is Part.attend and type(self).select is Part.select

    @property
    def captures(self) -> bool:
        """Whether a step of one token with this part may be recorded once and run again as it was.

        Its hooks then hang on tensors alone; what it counts in Python it counts behind the step.
        """
        return False

    def continued(self) -> Part:
        """The part as it goes on when the prompt is over, where `attach(while_decoding=True)` asks."""
        return self

    # The stages.

    def project(
        self, site: Site, x: Float[Tensor, "batch query width"]
    ) -> Float[Tensor, "batch query width"] | None:
        """The states that queries, keys and values are projected from, changed; None as they are."""
        return None

    def position(self, call: Call, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys as they are multiplied, after their rotation; what is cached stays."""
        return q, k

    def values(self, call: Call, v: Tensor) -> Tensor:
        """Values as they are weighed; what is cached stays."""
        return v

    def score_mod(self, call: Call) -> ScoreMod | None:
        """A pointwise change of this call's scores, None for no change.

        Its indices are columns of the original sequence, whatever a cache has dropped.
        """
        return None

    def mask(self, call: Call) -> Bool[Tensor, "#batch #heads #query keys"] | None:
        """Pairs of query and slot that may meet, combined with the model's own mask; None: all."""
        return None

    def normalize(
        self,
        call: Call,
        weights: Float[Tensor, "batch heads query keys"],
        queries: Int[Tensor, " query"],
        keys: Int[Tensor, " keys"] | Int[Tensor, "batch heads keys"],
    ) -> Float[Tensor, "batch heads query keys"]:
        """A block of weights after the softmax, changed or as it is; arguments as `Recorder.update`."""
        return weights

    def output(
        self, call: Call, heads: Float[Tensor, "batch query heads value_dim"]
    ) -> Float[Tensor, "batch query heads value_dim"]:
        """The heads' outputs, changed or as they are."""
        return heads

    # Around them.

    def select(self, call: Call) -> Chosen | None:
        """The slots that this step reads; None for all. One part of a session may choose."""
        return None

    def attend(self, call: Call) -> Float[Tensor, "batch query heads value_dim"] | None:
        """The whole attention of this call in another way; None leaves it to the next part, or to us."""
        return None

    def observe(self, call: Call) -> None:
        """Called after this call's attention, without gradients unless the part wants them."""

    def stream(
        self, site: Site, x: Float[Tensor, "batch query width"]
    ) -> Float[Tensor, "batch query width"] | None:
        """What passes one of the part's `points`, changed; None as it is.

        residual    what enters a block, before its first norm
        attention   what the attention of a block adds to it
        mlp         what the MLP of a block adds to it
        final       what leaves the last block
        """
        return None


class Selector(Part):
    """Reads a part of the keys that are there; the others stay where they are."""

    kind: ClassVar[Kind] = SELECT


class OnHeads(Part):
    """A part that is about some layers and heads."""

    layers: Layers = option("numbers of layers; all unless given", default=None)
    heads: Heads = option(
        "query heads, of all these layers or by layer; all unless given", default=None
    )

    def setup(self) -> None:
        """Understand which layers and heads are meant."""
        self.where = Where(self.layers, self.heads)


class Recorder(OnHeads):
    """Looks at attention weights, given block by block and never as a whole."""

    kind: ClassVar[Kind] = RECORD
    #: The preset of `attlas inspect` that shows its scores of heads; none without.
    inspects: ClassVar[str] = ""

    def update(
        self,
        call: Call,
        weights: Float[Tensor, "batch heads query keys"],
        queries: Int[Tensor, " query"],
        keys: Int[Tensor, " keys"] | Int[Tensor, "batch heads keys"],
    ) -> None:
        """Take in a block of weights, in float32 or of a float64 model in float64.

        Args:
            call: where the weights come from.
            weights: of the heads that are looked at; they sum to one over the keys (to less where the
                model has sink logits, and to zero in rows that are padding).
            queries: original positions of the block's queries.
            keys: original positions of its keys, per head where a cache dropped tokens (-1: empty).
        """

    def take_back(self, seen: int) -> None:
        """Forget what tokens behind the first `seen` left in the record.

        Raises:
            ValueError: the recorder does not say how.
        """
        if not self.rewinds:
            raise UserError(
                f"{type(self).__name__} holds a record of tokens that were taken back (cache.crop or "
                "assisted decoding) and defines no take_back(seen); record in a session of its own"
            )

    @property
    def rewinds(self) -> bool:
        """Whether it says how, or records nothing."""
        looks = any(
            getattr(type(self), hook) is not getattr(Recorder, hook)
            for hook in ("update", "observe", "stream")
        )
        return super().rewinds and (type(self).take_back is not Recorder.take_back or not looks)

    def result(self) -> Any:
        """What was recorded, layers stacked first."""
        raise NotImplementedError

    def head_scores(self) -> Mapping[str, Scores]:
        """Scores of the model's heads, by name, for `attlas inspect`; none unless overridden."""
        return {}


class Steerer(OnHeads):
    """Changes what attention does, on some layers, heads and spans of the text.

    Raises:
        ValueError: a span that is none.
    """

    kind: ClassVar[Kind] = STEER
    #: Options with which the part changes nothing, which the contract checks.
    nothing: ClassVar[dict[str, Any]] = {}

    spans: Spans | None = option("tokens that it is about, see `attlas.attach.where`", default=None)

    def setup(self) -> None:
        """Refuse spans that are none."""
        super().setup()
        if self.spans is not None:
            rows_of(self.spans)


class Patch(OnHeads):
    """Replaces something of a run: a head, a dimension, a position, by a constant or another run's."""

    kind: ClassVar[Kind] = PATCH
    #: Options with which the part changes nothing, which the contract checks; None where there are none.
    nothing: ClassVar[dict[str, Any] | None] = None
