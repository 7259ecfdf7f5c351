"""NormGrad: saliency as the gradient of a layer that changes nothing, asked for at each place.

Put behind a layer one that does nothing, whose weights are told apart by place u. Phase 1 takes their
gradient, x the feature and g the gradient of a logit by it, phase 2 makes one number of it:

    bias        x_u + b_u             m_u = g_u                 [C]
    scaling     s_u ∘ x_u             m_u = x_u ∘ g_u           [C]
    conv1x1     W_u x_u               m_u = x_u g_uᵀ            [C × C]
    conv3x3     W_u ⋆ x               m_u = (3×3 of x at u) g_uᵀ          [9C × C]
    depthwise   w_u ⋆ x, by channel   m_u = (3×3 of x at u) ∘ g_u         [9C]
    sum Σ m · norm ‖m‖ · positive-norm ‖max(m, 0)‖ · max

    NormGrad   conv1x1, norm: ‖x_u‖ ‖g_u‖
    Grad-CAM   scaling, sum, g averaged over places first
    layers     Π_l map_l^(w_l / Σ w), each resized and brought between 0 and 1
    class sensitivity   how little the maps of the likeliest and the least likely class correlate
    meta       the map after one step of SGD on the picture's own cross-entropy

Outer products are never made: their sum, norms and largest entry are those of both sides, so that a
place costs O(C). Cost: one backward pass (two, and a forward, with `meta`). With one layer the
combination reduces to that layer's map.

Source: "There and Back Again: Revisiting Backpropagation Saliency Methods".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.inspect.pictures import (
    as_map,
    feature_names,
    from_0_to_1,
    logits_of,
    outputs_of,
    resized,
    targets_of,
)
from attlas.inspect.subject import Subject
from attlas.kinds.analysis import Analysis, Findings, Table
from attlas.options import option

Extract = Literal["bias", "scaling", "conv1x1", "conv3x3", "conv3x3-depthwise"]
Aggregate = Literal["sum", "norm", "positive-norm", "max"]


def sides(
    x: Float[Tensor, "rows channels *places"], g: Float[Tensor, "rows channels *places"], extract: Extract
) -> tuple[Float[Tensor, "rows left *places"], Float[Tensor, "rows right *places"]]:
    """(a, b) whose outer product at each place is the gradient of the layer's weights.

    Raises:
        ValueError: 3 × 3 neighbours of what is no map.
    """
    if extract in ("conv3x3", "conv3x3-depthwise"):
        if x.ndim != 4:
            raise UserError(f"extract={extract!r} needs a map [rows, channels, height, width]")
        x = F.unfold(x, kernel_size=3, padding=1).unflatten(2, x.shape[2:])
    one = torch.ones_like(g[:, :1])
    if extract == "bias":
        return g, one
    if extract == "scaling":
        return x * g, one
    if extract == "conv3x3-depthwise":
        return x * g.repeat_interleave(9, dim=1), one
    return x, g


def extracted(
    x: Float[Tensor, "rows channels *places"], g: Float[Tensor, "rows channels *places"], extract: Extract
) -> Float[Tensor, "rows weights *places"]:
    """Phase 1 written out: the gradient of the layer's weights at every place, outer products made."""
    a, b = sides(x, g, extract)
    return (a[:, :, None] * b[:, None]).flatten(1, 2)


def saliency(
    x: Float[Tensor, "rows channels *places"],
    g: Float[Tensor, "rows channels *places"],
    extract: Extract = "conv1x1",
    aggregate: Aggregate = "norm",
    *,
    averaged: bool = False,
) -> Float[Tensor, "rows ..."]:
    """Both phases, from the sides of the outer products.

    Args:
        x: features.
        g: gradients of what is explained by them.
        extract: the layer that changes nothing.
        aggregate: what is made of its gradient.
        averaged: average g over the places first.
    """
    if averaged:
        g = g.flatten(2).mean(dim=2).reshape(*g.shape[:2], *(1 for _ in g.shape[2:])).expand_as(g)
    a, b = sides(x, g, extract)
    if aggregate == "sum":
        return a.sum(dim=1) * b.sum(dim=1)
    if aggregate == "norm":
        length: Tensor = a.norm(dim=1) * b.norm(dim=1)
        return length
    if aggregate == "positive-norm":
        same = a.clamp(min=0).norm(dim=1) * b.clamp(min=0).norm(dim=1)
        return torch.hypot(same, a.clamp(max=0).norm(dim=1) * b.clamp(max=0).norm(dim=1))
    ends = [one.amax(dim=1) for one in (a, -a, b, -b)]  # the largest product is one of the ends'
    return torch.stack([
        ends[0] * ends[2], -ends[0] * ends[3], -ends[1] * ends[2], ends[1] * ends[3],
    ]).amax(dim=0)  # fmt: skip


def combined(
    maps: Sequence[Float[Tensor, "rows height width"]], weights: Sequence[float] = ()
) -> Float[Tensor, "rows height width"]:
    """The weighted geometric mean of maps between 0 and 1; of equal weights unless given."""
    given = torch.tensor(weights or [1.0] * len(maps), dtype=maps[0].dtype, device=maps[0].device)
    shares = (given / given.sum())[:, None, None, None]
    found: Tensor = (torch.stack(list(maps)) ** shares).prod(dim=0)
    return found


def class_correlation(
    best: Float[Tensor, "rows height width"], worst: Float[Tensor, "rows height width"]
) -> Float[Tensor, " rows"]:
    """Pearson's correlation of the maps of two classes; 0 where one of them is even."""
    a, b = (m.flatten(1) - m.flatten(1).mean(dim=1, keepdim=True) for m in (best, worst))
    size = a.norm(dim=1) * b.norm(dim=1)
    return torch.where(size > 0, (a * b).sum(dim=1) / size, 0.0)


@mechanism("normgrad", paper="normgrad")
class NormGrad(Analysis):
    """Where in pictures a classifier's logit comes from, by features and gradients of some layers."""

    needs = "pictures"
    wants_gradients: ClassVar[bool] = True

    features: tuple[str, ...] = option(
        "modules whose outputs are looked at; the last block of each stage, or all blocks, unless given",
        default=(),
    )
    extract: Extract = option("the layer that changes nothing", default="conv1x1")
    aggregate: Aggregate = option("what is made of its gradient at a place", default="norm")
    averaged: bool = option("average gradients over places first, as Grad-CAM does", default=False)
    weights: tuple[float, ...] = option(
        "of the layers in their geometric mean; equal unless given", default=()
    )
    meta: float = option(
        "rate of one step of SGD that is taken first; the published program's 1e-4, 0 for no step",
        default=0.0, at_least=0,
    )  # fmt: skip

    def check(self, subject: Subject) -> None:
        """Refuse weights that do not fit the layers, and pictures without a classifier."""
        names = self._names(subject)
        if self.weights and (len(self.weights) != len(names) or min(self.weights) < 0):
            raise UserError(
                f"weights takes {len(names)} numbers of at least 0, one for each layer, got "
                f"{self.weights}"
            )
        if self.weights and not sum(self.weights):
            raise UserError("weights takes at least one that is not 0")

    def run(self, subject: Subject, tick: Callable[[float], None]) -> Findings:
        """Maps of the class explained and of the least likely, and how they correlate."""
        with torch.no_grad():
            logits = logits_of(subject)
        best = targets_of(subject, logits)
        maps = self.maps(subject, best)
        tick(0.5)
        others = self.maps(subject, logits.argmin(dim=-1))
        tick(1.0)
        names = self._names(subject)
        both, other = combined(maps, self.weights), combined(others, self.weights)
        alike = torch.stack([class_correlation(a, b) for a, b in zip(maps, others, strict=True)])
        rows = [(name, float(one.mean())) for name, one in zip(names, alike, strict=True)]
        rows.append(("all layers", float(class_correlation(both, other).mean())))
        return Findings(
            arrays={"map": both, "layers": torch.stack(maps), "class_correlation": alike},
            tables=[Table("Maps of the likeliest and the least likely class",
                          ("layer", "correlation"), rows)],
        )  # fmt: skip

    def maps(
        self, subject: Subject, classes: Int[Tensor, " rows"]
    ) -> list[Float[Tensor, "rows height width"]]:
        """Each layer's map of one class for each picture, at the pictures' size, between 0 and 1."""
        if not self.meta:
            return self._maps(subject, classes)
        each = [self._stepped(subject.rows(slice(i, i + 1)), classes[i : i + 1])
                for i in range(len(classes))]  # fmt: skip
        return [torch.cat(rows) for rows in zip(*each, strict=True)]

    def _names(self, subject: Subject) -> Sequence[str]:
        return self.features or feature_names(subject.model)

    def _maps(
        self, subject: Subject, classes: Tensor, weights: dict[str, Tensor] | None = None
    ) -> list[Tensor]:
        names = self._names(subject)
        assert subject.pixel_values is not None
        with torch.enable_grad(), outputs_of(subject.model, names) as kept:
            given = {k: v.detach().requires_grad_() for k, v in subject.inputs.items()}
            if weights is None:
                logits = subject.model(**given).logits
            else:
                logits = functional_call(subject.model, weights, (), given).logits
            missing = [name for name in names if name not in kept]
            if missing:
                raise UserError(f"features names {missing[0]!r}, which the model does not call")
            found = [kept[name] for name in names]
            gradients = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), found)
        size = subject.pixel_values.shape[-2:]
        pairs = [(as_map(x.detach(), subject), as_map(g, subject))
                 for x, g in zip(found, gradients, strict=True)]  # fmt: skip
        made = [saliency(x, g, self.extract, self.aggregate, averaged=self.averaged) for x, g in pairs]
        return [from_0_to_1(resized(one, size)) for one in made]

    def _stepped(self, subject: Subject, target: Tensor) -> list[Tensor]:
        """The maps of one picture with weights that went one step down its own cross-entropy."""
        names, weights = zip(*subject.model.named_parameters(), strict=True)
        with torch.enable_grad():
            moved = [w.detach().clone().requires_grad_() for w in weights]
            given = dict(zip(names, moved, strict=True))
            out = functional_call(subject.model, given, (), dict(subject.inputs)).logits
            downhill = torch.autograd.grad(F.cross_entropy(out, target), moved, allow_unused=True)
        pairs = zip(names, moved, downhill, strict=True)
        after = {name: w.detach() if d is None else w.detach() - self.meta * d for name, w, d in pairs}
        return self._maps(subject, target, after)
