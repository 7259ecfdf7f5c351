"""Codes whose heads share steps: one row of codes is the r-th token of every head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from attlas.ops.quantize import Codes, encode, pack, unpack
from attlas.ops.segments import Coded
from attlas.storage.coded import CodedBody
from attlas.storage.growing import Growing


def encode_rows(
    x: Float[Tensor, "batch heads tokens dim"],
    bits: int,
    *,
    channel: Float[Tensor, "batch heads 1 dim"] | None = None,
    meta: torch.dtype = torch.float16,
) -> Codes:
    """Codes with one step and zero for slot r of all heads, whatever token each head has there.

    Every head sees the steps, whose memory is that of one.
    """
    batch, heads, tokens, dim = x.shape
    wide = x if channel is None else x.float() / channel.float()
    merged = encode(rearrange(wide, "b h t d -> b 1 t (h d)"), bits, meta=meta)
    codes = unpack(merged.data, bits, heads * dim)
    data = pack(rearrange(codes, "b 1 t (h d) -> b h t d", h=heads), bits)
    step, zero = (t.expand(batch, heads, tokens, 1) for t in (merged.step, merged.zero))
    return Codes(data, step, zero, bits, dim, 1, dim, channel, x.dtype)


@dataclass(frozen=True)
class SharedCoded(Coded):
    """Codes whose steps are counted once.

    Attributes:
        held: bytes of codes and steps.
    """

    held: int = 0

    @property
    def nbytes(self) -> int:
        """Codes and what goes with them."""
        return self.held


class SharedBody(CodedBody):
    """Codes with steps that are each head's own, or shared by all heads and then held once.

    Args:
        k: the keys' codes.
        v: the values'.
        index: original positions, −1 behind the last of a shorter row; as many in every head.
        first: column of slot 0 where there is no index.
    """

    kind = "shared"

    def __init__(
        self,
        k: Codes,
        v: Codes,
        index: Int[Tensor, "batch kv_heads slots"] | None = None,
        first: int = 0,
    ) -> None:
        super().__init__(k, v, index, first)
        for name, held in self.held.items():
            shared = held.tensor.shape[1] > 1 and held.tensor.stride(1) == 0
            if shared and held.tensor.numel():
                self.held[name] = Growing(held.tensor[:, :1])

    def _codes(self, name: str) -> Codes:
        parts = {p: self.held[f"{name}.{p}"].tensor for p in self._formats[name].tensors}
        return self._formats[name].with_tensors(_for_heads(parts))

    def segment(self, index: Tensor | None = None, page: int = 1) -> Coded:
        """Codes of all slots, or those of the listed pages."""
        if index is not None:
            return super().segment(index, page)
        held = sum(h.tensor.nbytes for h in self.held.values())
        return SharedCoded(self.k, self.v, self.lengths, held=held)

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], constants: dict[str, Any]) -> SharedBody:
        """The body of these tensors and formats."""
        whole = {"index": tensors["index"]} if "index" in tensors else {}
        for name in ("k", "v"):
            parts = {n[2:]: t for n, t in tensors.items() if n.startswith(f"{name}.")}
            whole |= {f"{name}.{part}": t for part, t in _for_heads(parts).items()}
        body = super().restored(whole, constants)
        assert isinstance(body, cls)
        return body


def _for_heads(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Steps and zeros as every head sees them."""
    heads = parts["data"].shape[1]
    return {
        part: t.expand(-1, heads, -1, -1) if part in ("step", "zero") else t
        for part, t in parts.items()
    }
