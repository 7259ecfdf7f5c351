"""Direct logit attribution: what each head, each MLP and the embedding adds to chosen logits.

    stream = x_0 + Σ_l (Σ_h z_h W_O,h + b_O + MLP_l)          logits = linear(stream) U + offset

where `linear` is the last norm with the size that the whole stream has in this run. All parts add up to
the logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attlas.errors import UserError
from attlas.inspect.readout import readout
from attlas.inspect.runs import kept
from attlas.inspect.weights import head_weights


@dataclass(frozen=True)
class Attribution:
    """What the parts of a model add to one number of each row, a sum of logits of its last token.

    Attributes:
        heads: of each head's output.
        biases: of what attention adds beside its heads' outputs.
        mlps: of each layer's MLP.
        embedding: of what enters the first block.
        offset: of what the logits have whatever the stream holds.
        logit: the number itself.
    """

    heads: Float[Tensor, "layers heads rows"]
    biases: Float[Tensor, "layers rows"]
    mlps: Float[Tensor, "layers rows"]
    embedding: Float[Tensor, " rows"]
    offset: Float[Tensor, " rows"]
    logit: Float[Tensor, " rows"]

    @property
    def total(self) -> Float[Tensor, " rows"]:
        """The sum of all parts."""
        layers = self.heads.sum(dim=(0, 1)) + self.biases.sum(dim=0) + self.mlps.sum(dim=0)
        return layers + self.embedding + self.offset


def attribution(
    model: nn.Module, ids: Int[Tensor, "rows tokens"], of: Float[Tensor, "rows vocabulary"]
) -> Attribution:
    """Direct attribution of Σ_v of_v logit_v at the last token.

    Args:
        model: with its head, whose blocks add what attention and MLP give to the stream.
        ids: texts.
        of: how much each logit counts, say 1 for the right answer and -1 for the wrong one.

    Raises:
        ValueError: a model whose blocks add something else.
    """
    run = kept(model, ids, ("residual", "attention", "mlp", "final", "heads"))
    passed = {name: x[:, :, -1] for name, x in run.passed.items()}
    out, whole = readout(model), passed["final"][0]
    direction = of.to(out.weight) @ out.weight.T

    def share(piece: Tensor) -> Tensor:
        return (out.linear(whole.expand(piece.shape), piece) * direction).sum(dim=-1)

    heads, biases = [], []
    for layer, z in enumerate(passed["heads"]):
        weights = head_weights(model, layer)
        pieces = torch.einsum("rhd,hdw->hrw", z, weights.o)
        heads.append(share(pieces))
        biases.append(share(passed["attention"][layer] - pieces.sum(dim=0)))
    parts = passed["residual"][0] + (passed["attention"] + passed["mlp"]).sum(dim=0)
    if not torch.allclose(parts, whole, rtol=1e-3, atol=1e-3 * float(whole.abs().max())):
        raise UserError(
            f"the stream of {type(model).__name__} is not what its attention and MLPs add to the "
            "embedding, so that its logits cannot be shared out among them"
        )
    logit = (of.to(run.logits) * run.logits[:, -1]).sum(dim=-1)
    offset = of.to(out.weight) @ out.offset.to(out.weight)
    embedding, mlps = share(passed["residual"][0]), share(passed["mlp"])
    return Attribution(torch.stack(heads), torch.stack(biases), mlps, embedding, offset, logit)
