"""Softmax attention taken apart in small language models: its divisor replaced, its powers cut off.

Each layer is `softmax-as-rnn` with other options, in the same decoder, on the same windows of text. What
is cut off at a power is trained as the sum of recurrences that it is, so heads must be narrow: 16
channels have 4845 monomials of degree up to 4.
"""

from __future__ import annotations

from collections.abc import Iterator

from attlas.catalog.registry import mechanism
from attlas.kinds.claim import Claim
from attlas.kinds.study import Beats, NoWorse, Row, Study
from attlas.options import option

#: The authors' program clamps scores at 5 wherever nothing divides.
_ALL = "order=None, clamp=5.0"
#: Name of a row -> the layer, as `attlas train` takes it.
VARIANTS = {
    "softmax": "softmax",
    "norm": f"softmax-as-rnn({_ALL}, divisor='length', norm=True)",
    "gate": f"softmax-as-rnn({_ALL}, divisor='none', gate=True)",
    "length": f"softmax-as-rnn({_ALL}, divisor='length')",
    "length and gate": f"softmax-as-rnn({_ALL}, divisor='length', gate=True)",
    "powers to 2": "softmax-as-rnn(order=2)",
    "powers to 4": "softmax-as-rnn(order=4)",
    "powers to 2, norm": "softmax-as-rnn(order=2, divisor='length', norm=True)",
    "elu": "softmax-as-rnn(kernel='elu')",
    "relu": "softmax-as-rnn(kernel='relu')",
    "elu, norm": "softmax-as-rnn(kernel='elu', divisor='length', norm=True)",
    "relu, norm": "softmax-as-rnn(kernel='relu', divisor='length', norm=True)",
}


@mechanism(
    "softmax-as-rnn-ablations", paper="softmax-as-rnn",
    example={"task": "shakespeare-bytes(length=4)", "steps": 1, "batch": 64,
             "dim": 8, "heads": 2, "layers": 1},
)  # fmt: skip
class SoftmaxAsRNNAblations(Study):
    """Bits a byte with exp and another divisor, with some powers of exp, and with linear kernels."""

    claim = (
        "a norm in the divisor's place costs softmax attention little, a linear kernel in exp's "
        "much more, and the more powers of exp, the nearer"
    )
    expects = (
        NoWorse("norm", "softmax", 0.02),
        *(Beats("norm", linear) for linear in ("elu", "relu", "elu, norm", "relu, norm")),
        Beats("powers to 2", "elu"),
        NoWorse("powers to 4", "softmax", 0.02),
    )

    task: str = option("as `attlas train` takes it", default="shakespeare-bytes")
    steps: int = option("of AdamW", default=1000, at_least=1)
    batch: int = option("rows of a step", default=32, at_least=1)
    dim: int = option("width of the models", default=64, at_least=1)
    layers: int = option("of a model", default=2, at_least=1)
    heads: int = option("of each layer", default=4, at_least=1)

    @property
    def set_up(self) -> str:
        """The task, and what is trained for how long."""
        return (
            f"bits a byte of `{self.task}` after {self.steps} steps, {self.layers} layers, "
            f"dim {self.dim}, {self.heads} heads"
        )

    def run(self, seed: int) -> Iterator[Row]:
        """Train every variant with this seed, and score it on held-out text."""
        *against, ours = VARIANTS.values()
        trained = Claim(
            self.claim, self.task, ours=ours, against=tuple(against), better="lower",
            steps=self.steps, batch=self.batch, dim=self.dim, layers=self.layers,
            heads=self.heads, device=self.device,
        )  # fmt: skip
        for name, row in zip(VARIANTS, trained.run(seed), strict=True):
            yield row._replace(name=name)
