"""How a model says the right letter: attribution, patching, and the few directions that heads need.

    attribution    logit(right) − mean of the letters' logits = Σ parts, see `attlas.inspect.attribution`
    patching       effect of each head's output at the last token, from a prompt with another answer
    subspaces      x' = μ + V Vᵀ (x − μ)      for q of the last token and k of the options' tokens

V are the first right singular vectors of centred q (or k) over prompts, before their rotation: as the
model of the paper adds positions to scores, its q and k are not rotated either. Letters that are drawn
instead of A, B, C, D in their order tell whether what the directions hold is "the n-th option".

Cost: one run for each head; two for attribution and subspaces.

Source: "Does Circuit Analysis Interpretability Scale? Evidence from Multiple Choice Capabilities in
Chinchilla".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attlas.attach.call import Call
from attlas.attach.part import Patch
from attlas.attach.where import in_positions
from attlas.cache.rotations import rotation_of
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.inspect.attribution import attribution
from attlas.inspect.runs import kept, patched_heads
from attlas.kinds.analysis import Analysis, Findings, Scores, Table
from attlas.options import option
from attlas.storage.rotary import Rotation

if TYPE_CHECKING:
    from attlas.inspect.subject import Subject


@dataclass(frozen=True)
class Space:
    """Directions around a mean.

    Attributes:
        mean: μ.
        basis: V, its columns orthonormal.
    """

    mean: Float[Tensor, " dim"]
    basis: Float[Tensor, "dim directions"]

    @classmethod
    def of(cls, x: Float[Tensor, "samples dim"], directions: int) -> Space:
        """The first principal directions of samples."""
        mean = x.mean(dim=0)
        return cls(mean, torch.linalg.svd(x - mean, full_matrices=False).Vh[:directions].T)

    def project(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        """What of x lies in them."""
        mean, basis = self.mean.to(x), self.basis.to(x)
        return mean + (x - mean) @ basis @ basis.T


_PLANE = Space(torch.zeros(8), torch.eye(8)[:, :2])


@mechanism(
    "head-subspaces", paper="mcq-correct-letter-heads",
    example={"q": {(1, 0): _PLANE, (5, 0): _PLANE}, "k": {(2, 3): _PLANE}, "k_tokens": (3, 5)},
)  # fmt: skip
class HeadSubspaces(Patch):
    """Keeps of the queries and keys of some heads what lies in few directions, before their rotation."""

    whole_prompts = True  # its last token is the one that is meant
    nothing: ClassVar[dict[str, Any] | None] = {"q": {}, "k": {}}
    changes = ("project",)
    beyond = (
        "project: queries and keys are projected on few directions",
        "position: what was rotated is turned back for it and rotated again",
    )

    q: Mapping[tuple[int, int], Space] = option("of queries, by (layer, head)")
    k: Mapping[tuple[int, int], Space] = option(
        "of keys, by (layer, query head); the keys serve the other heads of the group too"
    )
    q_tokens: tuple[int, ...] = option("tokens whose queries are meant", default=(-1,))
    k_tokens: tuple[int, ...] = option("tokens whose keys are meant", default=())

    def setup(self) -> None:
        """How layers rotate is not known yet."""
        super().setup()
        self._rotations: dict[int, Rotation | None] = {}

    def check(self, model: nn.Module) -> None:
        """Find out how these layers rotate."""
        layers = dict.fromkeys(layer for layer, _ in [*self.q, *self.k])
        self._rotations = {x: rotation_of(model, x, type(self).__name__) for x in layers}

    def position(self, call: Call, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys of this call, projected where they are named."""
        count = call.q.shape[2]
        groups = q.shape[1] // k.shape[1]
        meant = self.where.over_heads(call.layer, q.shape[1], q.device).tolist()
        of_q = {h: space for (x, h), space in self.q.items() if x == call.layer and meant[h]}
        of_k = {h // groups: space for (x, h), space in self.k.items() if x == call.layer and meant[h]}
        own = self._projected(call, k[:, :, -count:], of_k, self.k_tokens)
        q = self._projected(call, q, of_q, self.q_tokens)
        return q, torch.cat([k[:, :, :-count], own], dim=2)

    def _projected(
        self, call: Call, x: Tensor, spaces: Mapping[int, Space], positions: tuple[int, ...]
    ) -> Tensor:
        if not spaces or not positions:
            return x
        rotation = self._rotations[call.layer]
        rotary = None if rotation is None else rotation.now()
        plain = x if rotary is None else rotary.unrotate(x, call.positions)
        heads = enumerate(plain.unbind(dim=1))
        changed = torch.stack([spaces[h].project(one) if h in spaces else one for h, one in heads], dim=1)
        back = changed if rotary is None else rotary.rotate(changed, call.positions)
        here = in_positions(positions, call.rows, x.shape[2], x.shape[0], x.device)[:, None, :, None]
        chosen = torch.tensor([h in spaces for h in range(x.shape[1])], device=x.device)
        return torch.where(here & chosen[:, None, None], back.to(x), x)


def spaces(
    model: nn.Module,
    ids: Tensor,
    heads: Iterable[tuple[int, int]],
    tokens: Mapping[str, tuple[int, ...]],
    directions: int,
) -> dict[str, dict[tuple[int, int], Space]]:
    """The directions of queries and keys of some heads, for `head-subspaces`.

    Args:
        model: whose they are.
        ids: prompts [rows, tokens] of one length, without padding.
        heads: (layer, query head).
        tokens: whose queries "q" and keys "k" are looked at.
        directions: how many are kept.
    """
    run = kept(model, ids, ("q", "k"))
    places = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
    found: dict[str, dict[tuple[int, int], Space]] = {"q": {}, "k": {}}
    for layer, head in heads:
        rotation = rotation_of(model, layer, "spaces")
        for name, each in found.items():
            x = run.passed[name][layer].transpose(1, 2)
            x = x if rotation is None else rotation.now().unrotate(x, places)
            at = head * x.shape[1] // run.passed["q"].shape[3]
            each[layer, head] = Space.of(x[:, at, list(tokens[name])].flatten(0, 1), directions)
    return found


@mechanism("mcq-correct-letter-heads", example={"letters": (5, 9, 11, 3)})
class CorrectLetterHeads(Analysis):
    """Which heads say the right letter of multiple choice: by direct attribution, and by patching.

    The letters are those that are right in any of the prompts, unless they are given.
    """

    needs = "prompts"

    letters: tuple[int, ...] | None = option("tokens of the letters", default=None)

    def run(self, subject: Subject, tick: Callable[[float], None]) -> Findings:
        """Both, and what MLPs and embedding add."""
        prompts = subject.prompts
        assert prompts is not None
        known = prompts.answers.flatten().tolist() if self.letters is None else self.letters
        letters = sorted(set(known))
        if len(letters) < 2:
            raise UserError(f"letters: two or more are needed to tell them apart, got {letters}")
        right = prompts.answers[:, 0]
        size = readout_size(subject.model)
        of = torch.zeros(len(prompts), size, device=subject.device, dtype=torch.float64)
        of[:, list(letters)] = -1.0 / len(letters)
        of.scatter_add_(1, right[:, None], torch.ones_like(of[:, :1]))
        parts = attribution(subject.model, prompts.clean, of)
        effects = patched_heads(subject.model, prompts, (-1,), tick)
        rows = [("embedding", float(parts.embedding.mean()))]
        rows += [(f"MLP {layer}", float(x.mean())) for layer, x in enumerate(parts.mlps)]
        direct = Scores(parts.heads.mean(dim=-1), "what it adds to the right letter's logit over others")
        patched = Scores(effects, "share of the answer that its output at the last token restores")
        off = float((parts.total - parts.logit).abs().max())
        return Findings(
            heads={"direct-attribution": direct, "patched-output": patched},
            tables=[Table("Direct attribution beside heads", ("part", "adds"), rows)],
            says=[f"All parts add up to the logits within {off:.1e}."],
        )


def readout_size(model: Any) -> int:
    """How many logits a model gives."""
    return int(model.get_output_embeddings().weight.shape[0])
