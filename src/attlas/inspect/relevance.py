"""Layer-wise relevance propagation as a gradient times its input: what rules make of the backward pass.

    R = x ∘ c,   c the gradient of a logit under these rules; at the output R is the logit
    ε-rule     R_i = x_i Σ_j w_ij R_j / (z_j + ε sign z_j),   z_j = Σ_i x_i w_ij + b_j
    αβ-rule    R_i = Σ_j (α (x_i w_ij)⁺ / z_j⁺ − β (x_i w_ij)⁻ / z_j⁻) R_j,   α − β = 1, no biases
    activations   φ(z) = z · (φ(z) / z), the quotient constant;  ReLU and max-pooling as they are
    norms         deviations are constants, so that they are linear
    attention     weights are constants: relevance goes to values alone
    products      of two states: half to each

Sums need no rule, since gradients add; so a residual stream of any form is followed. What biases hold
is lost to them. Cost: one forward and one backward pass. At ε = 0, in a net of ReLUs without biases, R is
input times gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Rule = Literal["epsilon", "alpha-beta"]
#: Below it a denominator of the αβ-rule is nothing.
TINY = 1e-9


class RelevanceRules(TorchFunctionMode):
    """While it is open, backward passes of what is computed give c, with relevance R = x ∘ c.

    Args:
        linear: the rule of linear layers.
        conv: of convolutions.
        epsilon: of the ε-rule.
        alpha: of the αβ-rule, whose β is α − 1.
    """

    def __init__(
        self, linear: Rule = "epsilon", conv: Rule = "epsilon", *, epsilon: float = TINY,
        alpha: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.epsilon, self.alpha = epsilon, alpha
        self.rules: dict[Any, Callable[..., Any]] = {
            F.linear: self._of(linear), torch.conv2d: self._of(conv), F.conv2d: self._of(conv),
            F.scaled_dot_product_attention: _attention,
        }  # fmt: skip
        self.rules |= dict.fromkeys((torch.softmax, F.softmax, Tensor.softmax), _constant)
        self.rules |= dict.fromkeys((torch.rsqrt, Tensor.rsqrt), _constant)
        self.rules |= dict.fromkeys(
            (F.silu, F.gelu, F.sigmoid, torch.sigmoid, torch.tanh, F.tanh, F.softplus), _activation
        )
        self.rules |= dict.fromkeys((F.layer_norm, torch.layer_norm), _layer_norm)
        self.rules |= dict.fromkeys((F.rms_norm, torch.rms_norm), _rms_norm)
        self.rules |= dict.fromkeys((F.group_norm, torch.group_norm), _group_norm)
        self.rules |= dict.fromkeys(
            (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.matmul, Tensor.matmul,
             Tensor.__matmul__), _product,
        )  # fmt: skip

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Compute as ever, and have the gradient be what a rule says."""
        given = dict(kwargs or {})
        rule = self.rules.get(func)
        return func(*args, **given) if rule is None else rule(func, *args, **given)

    def _of(self, rule: Rule) -> Callable[..., Any]:
        return self._epsilon_rule if rule == "epsilon" else self._alpha_beta_rule

    def _epsilon_rule(
        self, func: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **given: Any
    ) -> Tensor:
        z: Tensor = func(x, weight, bias, *args, **given)
        fixed = z.detach()
        share = fixed / (fixed + torch.where(fixed < 0, -self.epsilon, self.epsilon))
        return _valued(fixed, z * share)

    def _alpha_beta_rule(
        self, func: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **given: Any
    ) -> Tensor:
        z: Tensor = func(x, weight, bias, *args, **given).detach()
        above, below = (weight.clamp(min=0), weight.clamp(max=0))
        more, less = x.clamp(min=0), x - x.clamp(min=0)
        speaks = func(more, above, None, *args, **given) + func(less, below, None, *args, **given)
        found = self.alpha * speaks * (z / (speaks.detach() + TINY))
        if self.alpha != 1:
            against = func(more, below, None, *args, **given) + func(less, above, None, *args, **given)
            found = found - (self.alpha - 1) * against * (z / (against.detach() - TINY))
        return _valued(z, found)


def relevance(
    logits: Float[Tensor, "rows classes"], classes: Int[Tensor, " rows"], states: Sequence[Tensor]
) -> list[Tensor]:
    """R of states, from the logits of one class each: what was computed while the rules were open."""
    with torch.enable_grad():
        start = logits.gather(1, classes[:, None]).sum()
        found = torch.autograd.grad(start, list(states), retain_graph=True)
    return [x.detach() * c for x, c in zip(states, found, strict=True)]


def _valued(value: Tensor, gradient: Tensor) -> Tensor:
    """A tensor of one value whose gradient is another's."""
    return value + (gradient - gradient.detach())


def _constant(func: Any, *args: Any, **given: Any) -> Tensor:
    found: Tensor = func(*args, **given)
    return found.detach()


def _activation(func: Any, x: Tensor, *args: Any, **given: Any) -> Tensor:
    found: Tensor = func(x, *args, **given).detach()
    near = x.detach().abs() < TINY
    slope = torch.where(near, 0.0, found / torch.where(near, 1.0, x.detach()))
    return _valued(found, x * slope)


def _attention(func: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **given: Any) -> Any:
    return func(query.detach(), key.detach(), value, *args, **given)


def _product(func: Any, x: Any, y: Any, *args: Any, **given: Any) -> Any:
    found = func(x, y, *args, **given)
    both = all(isinstance(side, Tensor) and side.requires_grad for side in (x, y))
    return _valued(found.detach(), found / 2) if both else found


def _layer_norm(
    func: Any, x: Tensor, shape: Sequence[int], weight: Tensor | None = None,
    bias: Tensor | None = None, *args: Any, **given: Any,
) -> Tensor:  # fmt: skip
    found: Tensor = func(x, shape, weight, bias, *args, **given)
    axes = tuple(range(-len(shape), 0))
    centred = x - x.mean(dim=axes, keepdim=True)
    normed = func(x.detach(), shape, None, None, *args, **given)
    return _valued(found.detach(), _linear(centred, normed, weight))


def _rms_norm(
    func: Any, x: Tensor, shape: Sequence[int], weight: Tensor | None = None, *args: Any, **given: Any
) -> Tensor:
    found: Tensor = func(x, shape, weight, *args, **given)
    return _valued(found.detach(), _linear(x, func(x.detach(), shape, None, *args, **given), weight))


def _group_norm(
    func: Any, x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
    *args: Any, **given: Any,
) -> Tensor:  # fmt: skip
    found: Tensor = func(x, groups, weight, bias, *args, **given)
    split = x.unflatten(1, (groups, -1)).flatten(2)
    centred = (split - split.mean(dim=2, keepdim=True)).reshape(x.shape)
    normed = func(x.detach(), groups, None, None, *args, **given)
    broad = None if weight is None else weight.reshape(-1, *(1 for _ in x.shape[2:]))
    return _valued(found.detach(), _linear(centred, normed, broad))


def _linear(centred: Tensor, normed: Tensor, weight: Tensor | None) -> Tensor:
    """What is normed as a constant times what it is linear in; 0 where that is 0."""
    fixed = centred.detach()
    gone = fixed == 0
    slope = torch.where(gone, 0.0, normed / torch.where(gone, 1.0, fixed))
    return centred * slope if weight is None else centred * slope * weight
