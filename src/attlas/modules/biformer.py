"""BiFormer: every region of a picture attends to the pixels of the few regions most like it.

The map is cut into S × S regions r. Means of a region's queries and keys tell which regions it reads:

    A_rs = mean_r(q) · mean_s(k)               I_r = the k regions s of the largest A_rs
    out  = W_O (concat_heads softmax(q_r k_Iᵀ · scale) v_I + conv(v))

k_I and v_I are the keys and values of all pixels of the regions I_r, gathered; all heads read the same
regions. conv is a convolution of every channel by itself over the whole map ("local context"). The
published scale is 1/√(width of the keys of all heads together), not of one head. With `soft_routing`
gathered keys and values are multiplied by softmax_{I_r}(A_rs · scale). No gradient goes through A.

A map whose sides are no multiples of S is completed by pixels that nobody reads.

Cost: k · n / S² keys for each of n pixels, beside S⁴ products of regions: least, O(n^(4/3)), at
S ≈ n^(1/3).
Reduces to softmax attention plus the convolution where k is the number of regions.
Source: "BiFormer: Vision Transformer with Bi-Level Routing Attention".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad

from attlas import ops
from attlas.catalog.registry import mechanism
from attlas.kinds.feature_map import FeatureMap, Map
from attlas.options import option


@mechanism(
    "biformer-routing", aliases=("bi-level-routing-attention",),
    example={"heads": 2, "regions": 3, "topk": 2},
)  # fmt: skip
class BiLevelRouting(FeatureMap):
    """Bi-level routing attention."""

    heads: int = option("of queries, keys and values", default=8, at_least=1)
    regions: int = option("along the height, and along the width", default=7, at_least=1)
    topk: int = option("regions that a region reads, at most all of them", default=4, at_least=1)
    qk_dim: int = option(
        "width of queries and keys, all heads together; the channels unless given", at_least=1,
        factory=lambda module: module.channels,
    )  # fmt: skip
    scale: float = option(
        "of the products of pixels; 1/√qk_dim unless given", above=0,
        factory=lambda module: module.qk_dim**-0.5,
    )  # fmt: skip
    kernel_size: int | None = option(
        "rows and columns of the convolution of the values, odd; None for none", default=3, at_least=1
    )
    soft_routing: bool = option("whether a region's affinity weighs its keys and values", default=False)

    def setup(self) -> None:
        """Projections and the convolution.

        Raises:
            ValueError: heads that do not divide both widths, more regions to read than there are, an even
                kernel.
        """
        super().setup()
        for name, width in (("channels", self.channels), ("qk_dim", self.qk_dim)):
            if width % self.heads:
                raise ValueError(f"heads must divide {name}={width}, got {self.heads}")
        if self.topk > self.regions**2:
            raise ValueError(
                f"topk must be at most the {self.regions**2} regions that there are, got {self.topk}"
            )
        self.q_proj = nn.Linear(self.channels, self.qk_dim)
        self.k_proj = nn.Linear(self.channels, self.qk_dim)
        self.v_proj = nn.Linear(self.channels, self.channels)
        self.o_proj = nn.Linear(self.channels, self.channels)
        self.local = None
        if self.kernel_size is not None:
            if self.kernel_size % 2 == 0:
                raise ValueError(f"kernel_size must be odd, got {self.kernel_size}")
            self.local = nn.Conv2d(
                self.channels, self.channels, self.kernel_size, padding=self.kernel_size // 2,
                groups=self.channels,
            )  # fmt: skip

    def mix(self, x: Map, previous: Sequence[Tensor] = ()) -> Map:
        """Routing of regions, attention of pixels, and the local term."""
        pixels = x.permute(0, 2, 3, 1)
        v = self.v_proj(pixels)
        out = self.attend(self.q_proj(pixels), self.k_proj(pixels), v)
        if self.local is not None:
            out = out + self.local(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y: Tensor = self.o_proj(out)
        return y.permute(0, 3, 1, 2)

    def attend(
        self, q: Float[Tensor, "batch height width qk_dim"],
        k: Float[Tensor, "batch height width qk_dim"], v: Float[Tensor, "batch height width channels"],
    ) -> Float[Tensor, "batch height width channels"]:  # fmt: skip
        """Attention of all pixels to those of the regions that theirs reads, heads joined."""
        batch, height, width, _ = q.shape
        q, k, v = self.split(q), self.split(k), self.split(v)
        inside = self.inside(height, width, q.device)
        weights, chosen = self.route(q, k, inside)
        k, v = (self.gathered(t, chosen) for t in (k, v))
        if self.soft_routing:
            k, v = (t * weights.to(t.dtype)[..., None, None] for t in (k, v))
        seen = None
        if inside is not None:
            seen = inside[chosen].flatten(0, 1).flatten(1)[:, None, None]
        q = rearrange(q, "n r w (h d) -> (n r) h w d", h=self.heads)
        k, v = (rearrange(t, "n r i w (h d) -> (n r) h (i w) d", h=self.heads) for t in (k, v))
        out = ops.attend(q, k, v, mask=seen, scale=self.scale)
        joined = rearrange(
            out, "(n a b) h (y x) d -> n (a y) (b x) (h d)", n=batch, a=self.regions, b=self.regions,
            y=-(-height // self.regions),
        )  # fmt: skip
        return joined[:, :height, :width]

    def split(
        self, pixels: Float[Tensor, "batch height width joined"]
    ) -> Float[Tensor, "batch regions pixels joined"]:
        """The pixels of every region, zeros where the map does not fill the last ones."""
        height, width = pixels.shape[1:3]
        full = pad(pixels, (0, 0, 0, -width % self.regions, 0, -height % self.regions))
        return rearrange(full, "n (a y) (b x) c -> n (a b) (y x) c", a=self.regions, b=self.regions)

    def inside(
        self, height: int, width: int, device: torch.device
    ) -> Bool[Tensor, "regions pixels"] | None:
        """Which pixels of every region the map has; None where it has all."""
        if height % self.regions == 0 and width % self.regions == 0:
            return None
        return self.split(torch.ones(1, height, width, 1, device=device))[0, ..., 0] > 0

    @ops.exact
    def route(
        self, q: Float[Tensor, "batch regions pixels qk_dim"],
        k: Float[Tensor, "batch regions pixels qk_dim"], inside: Bool[Tensor, "regions pixels"] | None,
    ) -> tuple[Float[Tensor, "batch regions topk"], Int[Tensor, "batch regions topk"]]:  # fmt: skip
        """The regions that each region reads, the most alike first, and their weights."""
        # As exact as may be: what is chosen is read or not.
        q, k = ops.wide(q.detach()), ops.wide(k.detach())
        if inside is None:
            q_mean, k_mean = q.mean(2), k.mean(2)
        else:
            count = inside.sum(1, keepdim=True).clamp(min=1)
            q_mean, k_mean = ((t * inside[..., None]).sum(2) / count for t in (q, k))
        affinity = (q_mean * self.scale) @ k_mean.mT
        if inside is not None:  # a region without pixels is read last, and none of it is seen
            affinity = affinity.masked_fill(~inside.any(1), -torch.inf)
        largest, chosen = affinity.topk(self.topk, dim=-1)
        return largest.softmax(-1), chosen

    def gathered(
        self, pixels: Float[Tensor, "batch regions pixels joined"],
        chosen: Int[Tensor, "batch reading topk"],
    ) -> Float[Tensor, "batch reading topk pixels joined"]:  # fmt: skip
        """The pixels of the chosen regions of every image."""
        rows = torch.arange(len(pixels), device=pixels.device)[:, None, None]
        return pixels[rows, chosen]
