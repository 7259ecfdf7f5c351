"""DuoAttention: retrieval heads keep everything, streaming heads sinks and recent tokens alone.

    retrieval head      keys {0 … t}
    streaming head      keys {0 … s−1} ∪ {t−r+1 … t}

A gate α of each key head, optimised once for a model, says how much its output needs the whole
context (`duo_gates`); the share `sparsity` of all heads with the smallest gates stream. They count as
`round(sparsity · heads)` here, where the authors compare with a quantile, which is at most one head
more or less. Equal gates stream in the order of layers and heads.

The prompt's own attention is exact. Streaming heads are then really shorter. So that this stays so,
tokens that are no longer recent are moved behind the context of the retrieval heads, and
forgotten by the streaming heads, a block of them at a time: these see r to r + block − 1 recent tokens.

Cost: the context of retrieval heads is copied once a block. With `sparsity = 0` all heads retrieve:
full attention.

Source: "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from attlas.attach.call import Call
from attlas.cache.duo_gates import fit_gates
from attlas.cache.mixed import taken_columns
from attlas.cache.part import CachePart, Role
from attlas.calibration.parts import Calibrated
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.options import option
from attlas.storage.layer import LayerState, StoredLayer, Taken
from attlas.storage.ragged import RaggedBody
from attlas.storage.rows import Rows

NAME = "heads"


@mechanism(
    "duo-attention", aliases=("duoattention",),
    example={"sinks": 2, "recent": 6, "block": 3, "steps": 2},
)  # fmt: skip
class DuoAttention(Calibrated, CachePart):
    """Let the heads that do not retrieve hold sinks and recent tokens alone."""

    #: Streaming heads see fewer pairs.
    changes = ("mask",)
    role: ClassVar[Role] = "evict"

    sparsity: float = option(
        "share of the key heads of all full-attention layers that stream", default=0.5, at_least=0,
        at_most=1, kw_only=False,
    )  # fmt: skip
    pattern: Tensor | str | Path | None = option(
        "gates [layers, kv_heads] instead of a calibration, or a file of them: safetensors, or numbers "
        "in lines of text, a layer each, as the authors publish them", default=None,
    )  # fmt: skip
    sinks: int = option("first tokens that streaming heads keep", default=64, at_least=0)
    recent: int = option("newest tokens that streaming heads keep", default=256, at_least=1)
    block: int = option(
        "tokens that streaming heads forget at a time, once they are not recent", default=64,
        at_least=1,
    )  # fmt: skip
    steps: int = option(
        "steps of the gates' optimisation, when they are calibrated; the authors take 2000",
        default=80, at_least=1,
    )  # fmt: skip

    def setup(self) -> None:
        """Read the gates that are given.

        Raises:
            ValueError: a pattern that cannot be read, or one beside a calibration.
        """
        super().setup()
        if self.pattern is not None and self.calibration is not None:
            raise UserError("give pattern= or calibration=, not both")
        self.given = None if self.pattern is None else _gates(self.pattern)
        self.retrieves: dict[int, Bool[Tensor, " kv_heads"]] = {}

    def fit(
        self,
        model: nn.Module,
        texts: Sequence[Tensor],
        tick: Callable[[int, int], None],
        partial: Path | None,
    ) -> dict[str, Tensor]:
        """Gates of a model, optimised on passages in which passkeys are hidden."""
        layers = list(self.states(self.fresh_layers(model), model))
        gates = fit_gates(model, layers, texts, steps=self.steps, tick=tick, partial=partial)
        return {"gates": gates}

    def check(self, model: nn.Module) -> None:
        """Find the gates and decide which heads stream.

        Raises:
            ValueError: gates of another model, or of another number of layers or heads.
        """
        if self.given is None:
            super().check(model)
            gates = self.statistics["gates"]
        else:
            CachePart.check(self, model)
            gates = self.given
        config: Any = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        if list(gates.shape) != [config.num_hidden_layers, heads]:
            raise UserError(
                f"the pattern is of {list(gates.shape)} layers and heads, the model has "
                f"[{config.num_hidden_layers}, {heads}]"
            )
        layers = list(self.states(self.fresh_layers(model), model))
        chosen = retrieving(gates[layers].clamp(0, 1), self.sparsity)
        device = next(model.parameters()).device
        self.retrieves = dict(zip(layers, chosen.to(device), strict=True))

    def continued(self) -> CachePart:
        """Itself: streaming heads forget after every call anyway."""
        return self

    def compress(self, layer: StoredLayer, state: LayerState, rows: Rows) -> None:
        """Free what streaming heads do not hold."""
        self._leave(layer, state, rows, block=1)

    def later(self, layer: StoredLayer, state: LayerState, call: Call) -> None:
        """The same with what is no longer recent, a block at a time."""
        self._leave(layer, state, call.rows, block=self.block)

    def _leave(self, layer: StoredLayer, state: LayerState, rows: Rows, block: int) -> None:
        """Take what is no longer recent out of the dense slots, in whole blocks."""
        retrieves = self.retrieves[state.layer]
        if layer.dense_slots - self.recent < block or bool(retrieves.all()):
            return
        held = layer.bodies.get(NAME)
        assert held is None or isinstance(held, RaggedBody)
        counts = [max(0, n - self.recent) // block * block for n in layer.lengths(rows)]
        # A row of whose tokens none would be forgotten yet stays as it is.
        sunk = [0] * len(counts) if held is None else held.lengths.amin(dim=-1).tolist()
        counts = [n if n + min(m, self.sinks) > self.sinks else 0
                  for n, m in zip(counts, sunk, strict=True)]  # fmt: skip
        if not max(counts):
            return
        taken = layer.take(counts, rows)
        fresh = self._kept(taken, retrieves, held)
        layer.bodies[NAME] = fresh if held is None else joined(held, fresh)

    def _kept(
        self, taken: Taken, retrieves: Bool[Tensor, " kv_heads"], held: RaggedBody | None
    ) -> RaggedBody:
        """Of the tokens taken those that a head holds on to: all, or what its sinks lack."""
        slots = torch.arange(taken.k.shape[2], device=taken.k.device)
        columns = taken_columns(taken)
        lacks = self.sinks - (0 if held is None else held.lengths[..., None])
        keep = (columns >= 0) & (retrieves[:, None] | (slots < lacks))
        return RaggedBody.kept(taken.k, taken.v, columns, keep)


def retrieving(
    gates: Float[Tensor, "layers kv_heads"], sparsity: float
) -> Bool[Tensor, "layers kv_heads"]:
    """Which heads retrieve: all but the share `sparsity` with the smallest gates."""
    order = gates.flatten().sort(stable=True).indices
    chosen = torch.ones(gates.numel(), dtype=torch.bool, device=gates.device)
    chosen[order[: round(sparsity * gates.numel())]] = False
    return chosen.view(gates.shape)


def joined(first: RaggedBody, then: RaggedBody) -> RaggedBody:
    """Every head's slots of one body and behind them those of another."""
    runs = [
        (body, start, start + length)
        for both in zip(_runs(first), _runs(then), strict=True)
        for body, (start, length) in zip((first, then), both, strict=True)
    ]
    k, v, column = (
        torch.cat([getattr(body, name)[start:stop] for body, start, stop in runs])
        for name in ("k", "v", "column")
    )
    lengths = first.lengths + then.lengths
    offsets = (lengths.flatten().cumsum(0) - lengths.flatten()).view_as(lengths)
    return RaggedBody(k, v, column, offsets, lengths)


def _runs(body: RaggedBody) -> list[tuple[int, int]]:
    """(first slot, slots) of every row and head."""
    offsets: list[int] = body.offsets.flatten().tolist()
    lengths: list[int] = body.lengths.flatten().tolist()
    return list(zip(offsets, lengths, strict=True))


def _gates(given: Tensor | str | Path) -> Float[Tensor, "layers kv_heads"]:
    """Gates, from a file if they are not given as they are."""
    if not isinstance(given, Tensor):
        given = _read(Path(given))
    if given.ndim != 2:
        raise UserError(f"pattern takes gates [layers, kv_heads], got {list(given.shape)}")
    return given.detach().float()


def _read(path: Path) -> Tensor:
    try:
        if path.suffix == ".safetensors":
            (only,) = load_file(path).values()
            return only
        lines = path.read_text(encoding="utf-8").splitlines()
        return torch.tensor([[float(n) for n in line.split()] for line in lines if line.strip()])
    except FileNotFoundError:
        raise UserError(f"there is no pattern at {path}") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"the pattern at {path} cannot be read: it must be one tensor, or lines of numbers"
        ) from error
