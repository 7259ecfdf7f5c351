"""Tensors in a page: deflated, in base64, each in an element of its own that is unpacked when it is needed.

A reference {"blob", "dtype", "shape", "scale"} stands for a tensor; its value is what is stored times
the scale. Bytes of equal rank stand together, which deflates better. Text in the page's JSON is ASCII.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

#: How a tensor is stored: shares in [0, 1] in 16 bits, whole numbers from -1 on, anything else.
Form: TypeAlias = Literal["share", "index", "float"]
Reference: TypeAlias = dict[str, Any]
_ELEMENT = re.compile(r'<script type="application/octet-stream" id="blob-(\d+)">([^<]*)</script>')


class Packer:
    """Collects tensors; `elements` holds them all."""

    def __init__(self) -> None:
        self._blobs: dict[str, int] = {}

    def put(self, x: Tensor, form: Form) -> Reference:
        """A reference to a tensor that the page will hold."""
        array, scale = _stored(x.detach().cpu(), form)
        planes = array.reshape(-1, 1).view(np.uint8).T
        squeezer = zlib.compressobj(9, zlib.DEFLATED, -15)
        packed = squeezer.compress(np.ascontiguousarray(planes).tobytes()) + squeezer.flush()
        # What is there already (keys that serve several heads) is not stored again.
        number = self._blobs.setdefault(base64.b64encode(packed).decode("ascii"), len(self._blobs))
        return {
            "blob": number, "dtype": array.dtype.name, "shape": list(x.shape),
            "scale": scale,
        }  # fmt: skip

    def elements(self) -> str:
        """The elements of all tensors."""
        return "\n".join(
            f'<script type="application/octet-stream" id="blob-{number}">{blob}</script>'
            for blob, number in self._blobs.items()
        )


class Unpacker:
    """Reads a page's tensors."""

    def __init__(self, html: str) -> None:
        self._blobs = {int(number): blob for number, blob in _ELEMENT.findall(html)}

    def floats(self, reference: Mapping[str, Any]) -> Float[Tensor, "..."]:
        """A tensor of shares or other numbers."""
        array = self._array(reference).astype(np.float64) * reference["scale"]
        return torch.from_numpy(array).float()

    def index(self, reference: Mapping[str, Any]) -> Int[Tensor, "..."]:
        """A tensor of whole numbers from -1 on."""
        array = self._array(reference)
        signed = array.astype(np.int64)
        signed[array == np.iinfo(array.dtype).max] = -1
        return torch.from_numpy(signed).int()

    def _array(self, reference: Mapping[str, Any]) -> Any:
        raw = zlib.decompress(base64.b64decode(self._blobs[reference["blob"]]), -15)
        dtype = np.dtype(reference["dtype"]).newbyteorder("<")
        planes = np.frombuffer(raw, np.uint8).reshape(dtype.itemsize, -1)
        return np.ascontiguousarray(planes.T).view(dtype).reshape(reference["shape"])


def _stored(x: Tensor, form: Form) -> tuple[Any, float]:
    """(array, scale): little-endian, as it stands in the page."""
    if form == "share":
        steps = (x.double().clamp(0, 1) * 65535).round()
        return steps.numpy().astype("<u2"), 1 / 65535
    if form == "index":
        wide = bool(x.numel()) and int(x.max()) >= 65535
        dtype = np.dtype("<u4" if wide else "<u2")
        # -1 becomes the largest number of the type.
        return x.long().numpy().astype(dtype), 1
    return x.float().numpy().astype("<f4"), 1


def in_script(data: Any) -> str:
    """JSON in ASCII that cannot end the script element that it stands in."""
    packed = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return packed.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
