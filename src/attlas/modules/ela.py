"""Efficient local attention (ELA): rows and columns weighed by strips, without fewer channels.

    z_h = mean of x over the width        [batch, channels, height],     z_w = mean over the height
    a_h = σ(GroupNorm(conv(z_h))),        a_w = σ(GroupNorm(conv(z_w)))
    y   = x · a_h · a_w                   a_h along the height, a_w along the width

One 1-D convolution (odd kernel, grouped, without bias) and one normalisation serve both strips, so
that a transposed map gives the transposed output.

Versions: T (kernel 5, groups C, 32 norm groups), B (7, C, 16), S (5, C/8, 16), L (7, C/8, 16).

Cost: kernel · C² / groups + 2 C parameters; a strip of H + W values for each channel beside the map.
Reduces to the identity where all weights are 1.
Source: "ELA: Efficient Local Attention for Deep Convolutional Neural Networks".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attlas.catalog.registry import mechanism
from attlas.kinds.feature_map import FeatureMap, Map
from attlas.options import option

#: Of each version: kernel, channels of a group of the convolution, norm groups.
VERSIONS = {"T": (5, 1, 32), "B": (7, 1, 16), "S": (5, 8, 16), "L": (7, 8, 16)}


@mechanism("ela-efficient-local", aliases=("ela",), example={"channels": 16})
class ELA(FeatureMap):
    """Efficient local attention."""

    version: Literal["T", "B", "S", "L"] = option(
        "decides what is not given besides", default="B", kw_only=False
    )
    kernel: int = option(
        "positions that the convolution reads, odd; the version's unless given", at_least=1,
        factory=lambda module: VERSIONS[module.version][0],
    )  # fmt: skip
    groups: int | None = option(
        "of the convolution; the version's unless given", default=None, at_least=1
    )
    norm_groups: int | None = option(
        "groups of channels that are normalised together over a strip; the version's unless given",
        default=None, at_least=1,
    )  # fmt: skip

    def setup(self) -> None:
        """Make the convolution and the norm."""
        super().setup()
        if self.kernel % 2 == 0:
            raise ValueError(
                f"kernel must be odd, so that a strip keeps its length, got {self.kernel}"
            )
        _, per_group, norm_groups = VERSIONS[self.version]
        self.conv = nn.Conv1d(
            self.channels, self.channels, self.kernel, padding=self.kernel // 2, bias=False,
            groups=self._divisor("groups", self.groups, self.channels // per_group),
        )  # fmt: skip
        self.norm = nn.GroupNorm(
            self._divisor("norm_groups", self.norm_groups, norm_groups), self.channels
        )

    def _divisor(self, name: str, given: int | None, own: int) -> int:
        value = own if given is None else given
        if value < 1 or self.channels % value:
            whose = f"{value}, version {self.version}'s; give {name}"
            raise ValueError(
                f"{name} must divide channels={self.channels}, got {whose if given is None else value}"
            )
        return value

    def strips(
        self, x: Map
    ) -> tuple[Float[Tensor, "batch channels height"], Float[Tensor, "batch channels width"]]:
        """(a_h, a_w): the weights of rows and of columns."""
        return self._weights(x.mean(3)), self._weights(x.mean(2))

    def _weights(self, strip: Tensor) -> Tensor:
        norm = self.norm
        # nn.GroupNorm refuses groups of a single value, which here depends on the batch: a map one
        # pixel high may have them, and they become 0 like every value that is its own mean.
        normed = torch.group_norm(
            self.conv(strip), norm.num_groups, norm.weight, norm.bias, norm.eps
        )
        return normed.sigmoid()

    def gate(self, x: Map, previous: Sequence[Tensor] = ()) -> Map:
        """a_h · a_w at every position."""
        rows, columns = self.strips(x)
        return rows[..., None] * columns[:, :, None]
