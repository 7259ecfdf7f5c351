"""What policies have in common that only share a budget out, and rank keys by another's scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from attlas.attach.call import Call
from attlas.cache.part import CachePart
from attlas.cache.policy import CachePolicy, Slots
from attlas.catalog import registry
from attlas.errors import UserError
from attlas.options import option
from attlas.storage.layer import LayerState

#: Options that the sharing policy sets itself.
_OWN = ("keep", "tokens", "bytes", "while_decoding")


class ScoredPolicy(CachePolicy):
    """Base of the policies over a scorer, which may do no more with a cache than rank its keys."""

    #: Hooks of a policy that this one takes over; a scorer that needs them is refused.
    replaced: ClassVar[tuple[str, ...]] = (
        "drop", "placed", "attend", "mask", "score_mod", "select", "output", "begin", "cache_layers",
    )  # fmt: skip

    scorer: str = option("name of the policy that ranks the keys", default="snapkv")
    scorer_options: Mapping[str, object] = option(
        "options of the scorer, budget aside", factory=lambda part: {}
    )

    def setup(self) -> None:
        """Make the scorer.

        Raises:
            ValueError: it is no policy, or does more with a cache than rank its keys.
        """
        super().setup()
        self.ranker = self._made()
        self.rotates = self.ranker.rotates
        self.wants_hidden = self.ranker.wants_hidden
        if self.while_decoding:
            self.continued()

    def _made(self) -> CachePolicy:
        found = registry.find(self.scorer).object
        if not (isinstance(found, type) and issubclass(found, CachePolicy)):
            raise UserError(f"scorer takes a cache policy such as 'snapkv', got {self.scorer!r}")
        for hook in self.replaced:
            if getattr(found, hook) is not getattr(CachePolicy, hook):
                raise UserError(
                    f"{type(self).__name__} takes a scorer that only ranks keys; "
                    f"{found.__name__} does more (its {hook})"
                )
        if own := [name for name in self.scorer_options if name in _OWN]:
            raise UserError(
                f"scorer_options cannot set {own[0]}, which {type(self).__name__} sets itself"
            )
        given = {n: v for n in ("keep", "tokens", "bytes") if (v := getattr(self.budget, n))}
        policy: CachePolicy = registry.make(self.scorer, **given, **self.scorer_options)
        return policy

    def continued(self) -> CachePart:
        """The part as it goes on after the prompt.

        Raises:
            ValueError: the scorer cannot rank keys behind the prompt.
        """
        ranker = type(self.ranker)
        if ranker.later is not CachePolicy.later or "while_decoding" not in ranker.declared_options:
            raise UserError(
                f"{type(self).__name__} cannot hold its budget while decoding with {ranker.__name__} as "
                "its scorer, which ranks the keys of the prompt alone"
            )
        return super().continued()

    @property
    def floor(self) -> tuple[str, int]:
        """The scorer's."""
        return self.ranker.floor

    @property
    def skipped(self) -> tuple[int, ...]:
        """The layers that the scorer leaves whole."""
        return self.ranker.skipped

    def check(self, model: nn.Module) -> None:
        """Refuse what the scorer refuses."""
        self.ranker.check(model)
        super().check(model)

    def learn(self, state: LayerState, call: Call) -> None:
        """What the scorer needs."""
        self.ranker.learn(state, call)

    def scores(self, state: LayerState, slots: Slots) -> Float[Tensor, "batch kv_heads slots"]:
        """The scorer's."""
        return self.ranker.scores(state, slots)
