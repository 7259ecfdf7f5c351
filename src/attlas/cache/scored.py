"""What policies have in common that only share a budget out, and rank keys by another's scores."""

from __future__ import annotations

from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from attlas.attach.call import Call
from attlas.cache.policy import CachePolicy, Slots
from attlas.catalog import registry
from attlas.errors import UserError
from attlas.storage.layer import LayerState

#: Options that the sharing policy sets itself.
_OWN = ("keep", "tokens", "bytes", "while_decoding")


class ScoredPolicy(CachePolicy):
    """Base of the policies over a scorer.

    Args:
        keep: share of the context kept, in (0, 1].
        tokens: or tokens kept, on average.
        bytes: or bytes of the whole cache.
        scorer: name of the policy that ranks the keys.
        scorer_options: its options, budget aside.

    Raises:
        ValueError: a scorer that is no policy, or that does more with a cache than score it.
    """

    #: Hooks of a policy that this one takes over; a scorer that needs them is refused.
    replaced: ClassVar[tuple[str, ...]] = (
        "drop", "placed", "attend", "mask", "score_mod", "select", "output", "begin", "cache_layers",
    )  # fmt: skip

    def __init__(
        self,
        keep: float | None = None,
        *,
        tokens: int | None = None,
        bytes: int | None = None,
        scorer: str = "snapkv",
        scorer_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(keep, tokens=tokens, bytes=bytes)
        self.scorer = self._made(scorer, dict(scorer_options or {}))
        self.rotates = self.scorer.rotates
        self.wants_hidden = self.scorer.wants_hidden

    def _made(self, name: str, options: dict[str, Any]) -> CachePolicy:
        found = registry.find(name).object
        if not (isinstance(found, type) and issubclass(found, CachePolicy)):
            raise UserError(f"scorer takes a cache policy such as 'snapkv', got {name!r}")
        for hook in self.replaced:
            if getattr(found, hook) is not getattr(CachePolicy, hook):
                raise UserError(
                    f"{type(self).__name__} takes a scorer that only ranks keys; "
                    f"{found.__name__} does more (its {hook})"
                )
        if own := [option for option in options if option in _OWN]:
            raise UserError(
                f"scorer_options cannot set {own[0]}, which {type(self).__name__} sets itself"
            )
        given = {n: v for n in ("keep", "tokens", "bytes") if (v := getattr(self.budget, n))}
        policy: CachePolicy = registry.make(name, **given, **options)
        return policy

    @property
    def floor(self) -> tuple[str, int]:
        """The scorer's."""
        return self.scorer.floor

    @property
    def skipped(self) -> tuple[int, ...]:
        """The layers that the scorer leaves whole."""
        return self.scorer.skipped

    def check(self, model: nn.Module) -> None:
        """Refuse what the scorer refuses."""
        self.scorer.check(model)
        super().check(model)

    def learn(self, state: LayerState, call: Call) -> None:
        """What the scorer needs."""
        self.scorer.learn(state, call)

    def scores(self, state: LayerState, slots: Slots) -> Float[Tensor, "batch kv_heads slots"]:
        """The scorer's."""
        return self.scorer.scores(state, slots)
