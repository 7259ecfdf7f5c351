"""Head importance: how much the loss moves with a head's gate, and heads removed for good.

    y = Σ_h ξ_h z_h W_O,h + b_O,  ξ = 1          I_h = E_x |∂L(x)/∂ξ_h| = E_x |Σ_t z_h,t · ∂L(x)/∂z_h,t|

z_h is what head h gives before the output projection W_O, L(x) the loss of an example: of its labels
where they are given, else of each next token. Divided by the layer's L2 norm, √Σ_h I_h², heads of
different layers compare as the paper has it. `removed` takes the least important heads out of a model's
projections; what it computes equals what gates of zero would give.

Cost: one forward and backward pass a batch; no attention weights are held. Removing costs nothing.
Reduces to the model alone where no head is removed.

Source: "Are Sixteen Heads Really Better than One?".
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attlas.attach import attach
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.hf.models import Conv1D
from attlas.inspect.runs import Heads
from attlas.inspect.subject import Subject
from attlas.inspect.weights import attention_of, output_projection
from attlas.kinds.analysis import Analysis, Findings, Needs, Scores
from attlas.options import option
from attlas.parts.record.activations import Activations


@mechanism("head-importance", paper="head-importance")
class HeadImportance(Analysis):
    """Mean |∂L/∂ξ| of every head's gate over the examples."""

    needs: ClassVar[Needs] = "text"
    wants_gradients = True

    normed: Literal["no", "layer"] = option(
        "what scores are divided by: nothing, or each layer's L2 norm", default="layer"
    )
    batch_size: int = option(
        "examples whose gradient is one; the paper takes each by itself", default=1, at_least=1
    )

    def run(self, subject: Subject, tick: Callable[[float], None]) -> Findings:
        """One backward pass a batch."""
        assert subject.input_ids is not None
        count = len(subject.input_ids)
        total = torch.zeros(subject.layers, subject.heads, dtype=torch.float64, device=subject.device)
        for first in range(0, count, self.batch_size):
            rows = subject.rows(slice(first, first + self.batch_size))
            total += gate_gradients(rows).abs().double() / -(-count // self.batch_size)
            tick(min(1.0, (first + self.batch_size) / count))
        if self.normed == "layer":
            total = total / total.norm(dim=1, keepdim=True).clamp(min=1e-20)
        return Findings(heads={"importance": Scores(total, "the loss hangs on this head's gate")})


def gate_gradients(subject: Subject) -> Float[Tensor, "layers heads"]:
    """∂L/∂ξ of every head, of the mean loss of the subject's examples."""
    recorder = Activations(("heads",), gradients=True)
    with torch.enable_grad(), attach(subject.model, record=[recorder], compile=False):
        value = loss(subject)
        heads = [recorder.layer("heads", layer) for layer in range(subject.layers)]
        found = torch.autograd.grad(value, heads, allow_unused=True)
    gates = [
        x.new_zeros(x.shape[2]) if slope is None else (x.detach() * slope).sum(dim=(0, 1, 3))
        for x, slope in zip(heads, found, strict=True)
    ]
    return torch.stack(gates)


def loss(subject: Subject) -> Float[Tensor, ""]:
    """Mean over the examples: cross-entropy of their labels, or without labels of each next token.

    Raises:
        ValueError: a model that gives no logits, or a text of one token whose labels are not given.
    """
    logits = getattr(subject.forward(), "logits", None)
    if logits is None:
        name = type(subject.model).__name__
        raise UserError(f"{name} gives no logits; take the model with its head")
    if subject.labels is not None:
        return cross_entropy(logits, subject.labels.to(logits.device))
    assert subject.input_ids is not None
    valid, ids = subject.valid, subject.input_ids.to(logits.device)
    if logits.ndim != 3:
        raise UserError(
            f"{type(subject.model).__name__} gives logits {list(logits.shape)}; give labels, "
            "Subject(model, labels=...)"
        )
    if ids.shape[1] < 2:
        raise UserError("a text needs two tokens for a next one to be told; got one, and no labels")
    each = cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")
    asked = valid[:, 1:] & valid[:, :-1]
    found: Tensor = ((each * asked).sum(1) / asked.sum(1).clamp(min=1)).mean()
    return found


def least(scores: Float[Tensor, "layers heads"], count: int) -> dict[int, list[int]]:
    """The `count` heads of smallest score, by layer.

    Raises:
        ValueError: more heads than there are.
    """
    if not 0 <= count <= scores.numel():
        raise UserError(f"count must lie between 0 and {scores.numel()} heads, got {count}")
    found: dict[int, list[int]] = {}
    for at in scores.flatten().argsort(stable=True)[:count].tolist():
        layer, head = divmod(at, scores.shape[1])
        found.setdefault(layer, []).append(head)
    return found


def removed(model: nn.Module, heads: Heads) -> nn.Module:
    """A copy of a model without some of its heads: their slices of the projections are gone.

    A key head goes with the last query head that it serves. Where the query heads of a layer that stay
    are not served evenly, key heads are repeated for each of them, on the way out of their projection.
    A layer that loses all its heads keeps one, whose way out is zero. The configuration still tells the
    numbers of heads that there were: keep such a model with `torch.save`.

    Args:
        model: whose projections of q, k and v are separate, or GPT-2's.
        heads: those that go, by layer.

    Raises:
        ValueError: a head or layer that the model does not have, or projections of another kind.
    """
    smaller = copy.deepcopy(model)
    for layer, gone in heads.items():
        module, count, kv_count = attention_of(smaller, layer)
        out = set(gone)
        if out - set(range(count)):
            raise UserError(f"heads names {sorted(out)} of layer {layer}, which has {count}")
        if out:
            _shrink(module, [h for h in range(count) if h not in out], count, kv_count)
    return smaller


class Repeated(nn.Module):
    """A projection whose heads are repeated, each for the query heads that it serves.

    Args:
        linear: the projection.
        dim: width of a head.
        serving: the head that serves each query head.
    """

    def __init__(self, linear: nn.Linear, dim: int, serving: list[int]) -> None:
        super().__init__()
        self.linear, self.dim = linear, dim
        self.register_buffer("serving", torch.tensor(serving, device=linear.weight.device))

    def forward(self, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows out"]:
        """The heads, one for each query head."""
        found: Tensor = self.linear(x).unflatten(-1, (-1, self.dim))[..., self.get_buffer("serving"), :]
        return found.flatten(-2)


def _shrink(module: nn.Module, stay: list[int], count: int, kv_count: int) -> None:
    """Cut the projections of an attention down to the query heads that stay."""
    none = not stay
    stay = stay or [0]
    keys = sorted({head * kv_count // count for head in stay})
    serving = [keys.index(head * kv_count // count) for head in stay]
    served = {serving.count(each) for each in serving}
    way_out = output_projection(module)
    inner, names = _separate(module)
    _check_shared(module, count)
    if names is None:
        _shrink_fused(inner, stay, count)
        dim = inner.head_dim
    else:
        q, *rest = (getattr(inner, name) for name in names)
        dim = q.out_features // count
        setattr(inner, names[0], _rows(q, stay, dim))
        for name, linear in zip(names[1:], rest, strict=True):
            cut = _rows(linear, keys, linear.out_features // kv_count)
            even = len(served) == 1
            width = linear.out_features // kv_count
            setattr(inner, name, cut if even else Repeated(cut, width, serving))
        kept = len(keys) if len(served) == 1 else len(stay)
        _tell(inner, len(stay), kept, dim)
    _cut_way_out(way_out, stay, count, zero=none)


def _separate(module: nn.Module) -> tuple[Any, tuple[str, str, str] | None]:
    """(what holds the projections of q, k and v, their names; None for GPT-2's single one).

    Raises:
        ValueError: neither.
    """
    for inner in module.modules():
        for names in (("q_proj", "k_proj", "v_proj"), ("query", "key", "value")):
            if all(isinstance(getattr(inner, name, None), nn.Linear) for name in names):
                return inner, names
        if isinstance(getattr(inner, "c_attn", None), Conv1D) and hasattr(inner, "split_size"):
            return inner, None
    raise UserError(
        f"{type(module).__name__} projects q, k and v in a way whose heads cannot be taken out"
    )


def _check_shared(module: nn.Module, count: int) -> None:
    """Refuse weights that an attention has for each head beside its projections, such as sinks."""
    projections = [m for m in module.modules() if isinstance(m, nn.Linear | Conv1D)]
    linear = {id(w) for m in projections for w in m.parameters()}
    for name, weight in [*module.named_parameters(), *module.named_buffers()]:
        if id(weight) not in linear and weight.ndim and weight.shape[0] == count:
            raise UserError(f"{type(module).__name__} has {name!r} for each head, which cannot be cut")
    position = getattr(module, "position_encoding", None)
    if hasattr(position, "heads"):
        name = type(position).__name__
        raise UserError(f"{type(module).__name__} has a bias for each head, {name}, which cannot be cut")


def _rows(linear: nn.Linear, heads: list[int], dim: int) -> nn.Linear:
    """A projection to some of the heads."""
    at = _slots(heads, dim, linear.weight.device)
    cut = nn.Linear(linear.in_features, len(at), bias=linear.bias is not None).to(linear.weight)
    with torch.no_grad():
        cut.weight.copy_(linear.weight[at])
        if linear.bias is not None:
            cut.bias.copy_(linear.bias[at])
    return cut


def _shrink_fused(inner: Any, stay: list[int], count: int) -> None:
    """GPT-2's projection: q, k and v of all heads, side by side."""
    fused, dim = inner.c_attn, inner.head_dim
    one = _slots(stay, dim, fused.weight.device)
    at = torch.cat([one + part * count * dim for part in range(3)])
    fused.weight = nn.Parameter(fused.weight.detach()[:, at])
    fused.bias = nn.Parameter(fused.bias.detach()[at])
    fused.nf = len(at)
    inner.split_size, inner.num_heads = len(one), len(stay)


def _cut_way_out(linear: nn.Module, stay: list[int], count: int, zero: bool) -> None:
    """The output projection, without the inputs of the heads that go."""
    weight: Tensor = linear.weight.detach()  # type: ignore[operator]
    axis = 0 if isinstance(linear, Conv1D) else 1
    at = _slots(stay, weight.shape[axis] // count, weight.device)
    cut = weight.index_select(axis, at)
    linear.weight = nn.Parameter(torch.zeros_like(cut) if zero else cut)
    setattr(linear, "nx" if axis == 0 else "in_features", len(at))


def _tell(inner: Any, heads: int, kv_heads: int, dim: int) -> None:
    """Tell a module how many heads it has, by the names that it knows."""
    told = {
        "num_heads": heads, "num_attention_heads": heads, "heads": heads, "all_head_size": heads * dim,
        "num_key_value_heads": kv_heads, "kv_heads": kv_heads, "num_key_value_groups": heads // kv_heads,
    }  # fmt: skip
    for name, value in told.items():
        if name in vars(inner):
            setattr(inner, name, value)


def _slots(heads: list[int], dim: int, device: torch.device) -> Int[Tensor, " slots"]:
    """The channels of some heads."""
    at: Tensor = torch.tensor(heads)[:, None] * dim + torch.arange(dim)
    return at.flatten().to(device)
