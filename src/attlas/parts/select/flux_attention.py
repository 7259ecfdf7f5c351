"""Flux attention: a router looks at the prompt, and each layer reads it in full or sparsely.

    u      = mean over heads and tokens of q, of the first and the last `pool` tokens, before rotation
    full   = router_l(u): its second logit is above its first              one decision a prompt and layer
    layer  full:    token t sees {0 … t}
           sparse:  token t sees {0 … s−1} ∪ {t−r+1 … t}

A decision is taken when a prompt begins, for each of its rows, and holds for what follows in the same
cache: pieces of it, further turns, and generated tokens, which see sinks and recent tokens alone in
sparse layers. The cache keeps everything. Tokens count by each row's own valid ones. A layer that is
full for all rows is left to the model. A cache that was copied has no decisions: its next prompt is
decided anew, its generated tokens see everything.

`attlas calibrate flux-attention --length 4096` trains the routers with the model frozen
(`attlas.cache.flux_routers`), on texts of which half hide passkeys; `budget` is the share of sparse
layers aimed at on these, `plain` on the others. `force` sets routers aside.

Cost: n·(s + r) pairs in a sparse layer instead of n²/2. With force="full" it is the model alone.

Source: "Flux Attention: Context-Aware Hybrid Attention for Efficient LLMs Inference"; the authors' code
draws Gumbel noise in training alone, and takes budgets by task, 0.45 for questions and 1 for others. It
trains at 65536 tokens, 300 steps of 48 texts; here a step is one text. That prompts with
something to find get more full layers than plain ones, and keep their needles, has not been shown
here: 300 steps on a small random model did not separate them, a pretrained one needs a GPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attlas import masks
from attlas.attach.call import Call
from attlas.attach.part import Selector
from attlas.attach.thinned import Text, Thinned, by_texts, density_of, is_prompt, texts
from attlas.cache.duo_gates import streaming
from attlas.cache.flux_routers import Recipe, fit_routers, made, unrotated
from attlas.cache.rotations import rotation_of
from attlas.calibration.parts import Calibrated
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.options import option
from attlas.storage.rotary import Rotation


@mechanism(
    "flux-attention", aliases=("flux",),
    example={"sinks": 2, "recent": 6, "pool": 4, "steps": 4},
)  # fmt: skip
class FluxAttention(Calibrated, Thinned):
    """Let a router decide which layers read this prompt sparsely."""

    everything: ClassVar[dict[str, Any]] = {"force": "full"}

    force: Literal["full", "sparse"] | None = option(
        "what all layers do; routed unless given", default=None
    )
    sinks: int = option("first tokens that sparse layers see", default=128, at_least=0)
    recent: int = option("newest tokens that they see, itself included", default=2048, at_least=1)
    pool: int = option("tokens pooled at either end of a prompt", default=100, at_least=1)
    budget: float = option(
        "share of sparse layers that routers are trained for, where something is to be found",
        default=0.45, at_least=0, at_most=1,
    )  # fmt: skip
    plain: float = option("and on plain text", default=1.0, at_least=0, at_most=1)
    steps: int = option("of the routers' training", default=300, at_least=1)
    rate: float = option("its largest learning rate", default=5e-4, above=0)

    def setup(self) -> None:
        """No prompt has been read."""
        super().setup()
        #: By layer: which rows of the last prompt it read in full.
        self.full: dict[int, Bool[Tensor, " batch"]] = {}
        self.routers = nn.ModuleDict()
        self.rotations: dict[int, Rotation | None] = {}
        self._routes: WeakKeyDictionary[Any, dict[int, Tensor]] = WeakKeyDictionary()

    @property
    def calibration_key(self) -> str:
        """The name, and what routers were trained for."""
        told = ("sinks", "recent", "pool", "budget", "plain", "steps", "rate")
        return ",".join([super().calibration_key, *(f"{n}={getattr(self, n)}" for n in told)])

    def fit(
        self, model: nn.Module, texts: Sequence[Tensor], tick: Callable[[int, int], None],
        partial: Path | None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Routers trained on the texts, of which every other one gets passkeys."""
        recipe = Recipe(
            self.pool, self.sinks, self.recent, {"retrieval": self.budget, "plain": self.plain},
            self.steps, self.rate,
        )  # fmt: skip
        numbers = torch.cat([text.flatten() for text in texts]).to(torch.int64).cpu()
        key = f"{self.calibration_key} {hashlib.sha256(numbers.numpy().tobytes()).hexdigest()[:16]}"
        return fit_routers(model, self._rotations(model), texts, recipe, tick, partial, key)

    def _rotations(self, model: Any) -> dict[int, Rotation | None]:
        """Of the layers that are not left dense and have no sliding window."""
        config = model.config.get_text_config(decoder=True)
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        return {
            layer: rotation_of(model, layer, "flux-attention")
            for layer, kind in enumerate(kinds)
            if kind == "full_attention" and layer not in self.dense_layers
        }

    def check(self, model: nn.Module) -> None:
        """Find the routers, unless they are set aside.

        Raises:
            ValueError: none of this model, or of another number of layers.
        """
        if self.force is not None:
            Selector.check(self, model)
            return
        super().check(model)
        self.rotations = self._rotations(model)
        tensors = self.statistics
        known = {int(name.split(".")[0]) for name in tensors}
        if not set(self.rotations) <= known:
            raise UserError(
                f"routers were trained for layers {sorted(known)}, not for {list(self.rotations)}"
            )
        some = next(iter(tensors.values()))
        dim = tensors[f"{min(known)}.features.0.weight"].shape[1]
        self.routers = made(sorted(known), dim).to(some.device)
        self.routers.load_state_dict(tensors)

    def attend(self, call: Call) -> Float[Tensor, "batch query heads value_dim"] | None:
        """A prompt's attention; None where it is the model's own."""
        if not is_prompt(call) or call.layer in self.dense_layers:
            return None
        known = self._known(call)
        full = known if known is not None else self._decided(call)
        self.full[call.layer] = full
        if bool(full.all()):
            self.density[call.layer] = call.q.new_ones(call.q.shape[1])
            return None

        def attended(row: int | None, text: Text) -> Tensor:
            own = full if row is None else full[row][None]
            every = masks.padding(own[:, None].expand(-1, text.k.shape[2]))
            pattern = masks.causal & (streaming(self.sinks, self.recent) | every)
            self.density[call.layer] = density_of(pattern, text)
            return text.attend(pattern)

        return by_texts(call, attended)

    def mask(self, call: Call) -> Bool[Tensor, "batch heads 1 keys"] | None:
        """What a generated token sees in rows whose layer is sparse."""
        known = self._known(call) if call.q.shape[2] == 1 else None
        if known is None or bool(known.all()):
            return None
        columns = call.original_positions
        if columns is None:
            columns = torch.arange(call.k.shape[2], device=call.q.device).expand(len(known), 1, -1)
        # A static cache has room behind the last token, which the model's mask hides.
        _, rank = call.rows.at(columns.clamp(max=call.rows.seen - 1))
        near = (rank < self.sinks) | (rank > call.ranks[0][:, None] - self.recent)
        near = (near | known[:, None, None]).repeat_interleave(call.q.shape[1] // near.shape[1], 1)
        return near[:, :, None]

    def _known(self, call: Call) -> Bool[Tensor, " batch"] | None:
        """What was decided when the prompt in this cache began.

        Raises:
            ValueError: the cache has other rows now.
        """
        cache, batch = call.forward_pass.cache, call.q.shape[0]
        if cache is None or not call.forward_pass.offset:
            return None
        found = self._routes.get(cache, {}).get(call.layer)
        if found is None or len(found) == batch:
            return found
        if batch % len(found):
            raise UserError(f"flux-attention decided for {len(found)} rows, the cache has {batch} now")
        return found.repeat_interleave(batch // len(found))

    def _decided(self, call: Call) -> Bool[Tensor, " batch"]:
        """Which rows this layer reads in full; remembered for the cache."""
        full = torch.ones(call.q.shape[0], dtype=torch.bool, device=call.q.device)
        if self.force is not None:
            full = full & (self.force == "full")
        else:
            for row, at, text in texts(call):
                if at is None:
                    full = self._full(call, text, call.positions)
                else:
                    full[row] = self._full(call, text, call.positions[row, at][None])[0]
        if call.forward_pass.cache is not None:
            self._routes.setdefault(call.forward_pass.cache, {})[call.layer] = full
        return full

    def _full(self, call: Call, text: Text, positions: Tensor) -> Bool[Tensor, " batch"]:
        q = unrotated(call, text.q, positions, self.rotations[call.layer])
        sparse, full = self.routers[str(call.layer)](q, self.pool).unbind(-1)
        decided: Tensor = full > sparse
        return decided
