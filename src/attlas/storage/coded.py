"""Quantised keys and values, which grow by whole groups of tokens."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from attlas.errors import UserError
from attlas.ops.quantize import Codes
from attlas.ops.segments import Coded
from attlas.storage.body import Body, GrownBody

_FORMAT = ("bits", "dim", "token_group", "channel_group")


class CodedBody(GrownBody):
    """Keys and values as codes.

    Args:
        k: the keys' codes.
        v: the values'.
        index: original positions, −1 behind the last of a shorter row; None for `first` and on.
        first: column of slot 0 where there is no index.
    """

    kind = "coded"

    def __init__(
        self,
        k: Codes,
        v: Codes,
        index: Int[Tensor, "batch kv_heads slots"] | None = None,
        first: int = 0,
    ) -> None:
        if k.tokens != v.tokens:
            raise UserError(f"keys of {k.tokens} tokens cannot go with values of {v.tokens}")
        self._formats = {"k": k, "v": v}
        held = {
            f"{name}.{part}": tensor
            for name, codes in self._formats.items()
            for part, tensor in codes.tensors.items()
        }
        super().__init__(held, index, first)

    @property
    def k(self) -> Codes:
        """The keys' codes."""
        return self._codes("k")

    @property
    def v(self) -> Codes:
        """The values' codes."""
        return self._codes("v")

    def _codes(self, name: str) -> Codes:
        codes = self._formats[name]
        return codes.with_tensors({p: self.held[f"{name}.{p}"].tensor for p in codes.tensors})

    @property
    def slots(self) -> int:
        """Tokens of the longest row."""
        return self.held["k.data"].tensor.shape[2]

    def group(self, name: str) -> int:
        """Steps and zeros stand for a group of tokens; factors of channels for all of them."""
        which, part = name.split(".")
        groups = {"data": 1, "channel": 0}
        return groups.get(part, self._formats[which].token_group)

    def alike(self, other: Body) -> bool:
        """Whether the other holds codes of the same formats, with the same factors of channels."""
        if not isinstance(other, CodedBody) or not super().alike(other):
            return False
        pairs = [(self._formats[name], other._formats[name]) for name in ("k", "v")]
        return all(
            all(getattr(a, f) == getattr(b, f) for f in _FORMAT)
            and (a.channel is None) == (b.channel is None)
            and (a.channel is None or b.channel is None or torch.equal(a.channel, b.channel))
            for a, b in pairs
        )

    def segment(self, index: Tensor | None = None, page: int = 1) -> Coded:
        """Codes of all slots, or those of the listed pages."""
        return Coded(self.k, self.v, self.lengths, index, page)

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values as numbers."""
        return self.k.read(), self.v.read()

    @property
    def constants(self) -> dict[str, Any]:
        """The formats."""
        formats = {
            name: {**{f: getattr(codes, f) for f in _FORMAT}, "dtype": str(codes.dtype)[6:]}
            for name, codes in self._formats.items()
        }
        return {"first": self.first, **formats}

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], constants: dict[str, Any]) -> CodedBody:
        """The body of these tensors and formats."""
        made = []
        for name in ("k", "v"):
            form = {**constants[name], "dtype": getattr(torch, constants[name]["dtype"])}
            data, step, zero = (tensors[f"{name}.{part}"] for part in ("data", "step", "zero"))
            made.append(Codes(data, step, zero, channel=tensors.get(f"{name}.channel"), **form))
        return cls(made[0], made[1], tensors.get("index"), constants["first"])
