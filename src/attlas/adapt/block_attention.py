"""Block attention: passages read each by itself, cached once, and put in any prompt by a rotation.

    visible(q, k) = k ≤ q  and  (block(q) = block(k)  or  q is in the last block)

A prompt is passages and, last, a question. A token of a passage sees its own passage alone; the question,
and what is generated, sees everything. So the keys and values of a passage depend on it alone, but for
the rotation of the keys by their positions: those of a passage read from position 0 are

    k at position o + t  =  R(o) · k at position t

wherever it is put, o being the tokens before it. Each passage is read once; after that a prompt costs
its question, and a rotation of the cached keys. The model is tuned by the loss of the last block, half
under this mask and half under its own, so that it works in both modes. Every weight is trained.

    adapter = attlas.make("block-attention-rag", folder="passages")
    with adapter.inject(model):
        cache = adapter.context(passages)                  # ids; read from memory or the folder if known
        model.generate(torch.cat([*passages, question])[None], **with_cache(model, cache))
        with adapter.passages([len(p) for p in passages]): # the same in one pass, to train by
            model(ids, labels=labels)

Cost: for passages of p tokens p² pairs each, once; for a prompt n · m pairs, m tokens being its question.
Masks are dense here, so that the one pass, which training needs, costs n².
Reduces to the model itself with no passages. Source: "Block-Attention for Efficient RAG".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from attlas import masks, mechanism
from attlas.cache.rotations import rotation_of
from attlas.errors import UserError
from attlas.hf.caches import DynamicCache, DynamicLayer, filled, fresh_layers, with_cache
from attlas.kinds.masked import Masked, Tokens
from attlas.masks import Mask
from attlas.options import option
from attlas.storage.files import fingerprint
from attlas.storage.rotary import Rotary

FORMAT = "attlas-passage-1"
#: Numbers of each weight by which a model is told from its tuned self.
SAMPLED = 64

#: Keys and values of a passage in each layer.
States = list[tuple[Tensor, Tensor]]


def block_mask(block: Int[Tensor, "rows tokens"], last: Bool[Tensor, "rows tokens"]) -> Mask:
    """Tokens see earlier ones of their own block, those of the last block all earlier ones.

    Args:
        block: the number of each token's block.
        last: whether that is the last.
    """
    return masks.causal & (masks.document(block) | masks.padding(last).T)


def moved(rotary: Rotary, k: Float[Tensor, "batch heads tokens dim"], by: int) -> Tensor:
    """Keys that were rotated to some positions, as they are at positions `by` further on."""
    cos, sin = rotary.angles(torch.full((1, 1), by, device=k.device))
    exact = k.to(torch.promote_types(k.dtype, torch.float32))
    # The scale is in the keys already.
    turned = rotary.turn(exact, *(angle[:, None].to(exact) / rotary.scale for angle in (cos, sin)))
    return turned.to(k.dtype)


@mechanism("block-attention-rag", paper="block-attention-rag", example={"blocks": 3})
class BlockAttention(Masked):
    """Block attention, and its cache of passages."""

    changes: ClassVar[tuple[str, ...]] = ("position", "mask")

    blocks: int = option(
        "in how many a text of training is cut, the last of which is the question", default=8, at_least=2
    )
    folder: str | None = option(
        "where keys and values of passages are kept; in memory alone unless given", default=None
    )

    def setup(self) -> None:
        """No passage has been read."""
        super().setup()
        self._lengths: Int[Tensor, "rows passages"] | None = None
        self._known: dict[tuple[int, ...], States] = {}
        self._of: dict[str, Any] = {}

    def check(self, model: Any) -> None:
        """Refuse models whose keys cannot be moved, or do not stay.

        Raises:
            ValueError: naming the family, and a layer.
        """
        super().check(model)
        family = model.config.model_type
        for number, layer in enumerate(fresh_layers(model)):
            if type(layer) is not DynamicLayer:
                raise UserError(
                    f"{self.name} keeps all keys of a passage, and layer {number} of {family} keeps a "
                    f"{type(layer).__name__}"
                )
        self._rotations(model)

    def _rotations(self, model: Any) -> list[Rotary | None]:
        """Of each layer; None of one that does not rotate.

        Raises:
            ValueError: none does, or in a way that is not known or changes with the length.
        """
        count = len(fresh_layers(model))
        found = [rotation_of(model, layer, self.name, one=True) for layer in range(count)]
        if not any(found):
            raise UserError(
                f"{self.name} moves passages by rotating their keys, and {model.config.model_type} does "
                "not rotate them"
            )
        return [None if each is None else each.now() for each in found]

    # The mask --------------------------------------------------------------------------------------

    @contextmanager
    def passages(self, lengths: Sequence[int] | Sequence[Sequence[int]]) -> Iterator[None]:
        """Within, texts begin with passages of so many tokens, each of which sees itself alone.

        Args:
            lengths: of the passages of all rows, or of each row; tokens behind them are the question.
                Padding counts for nothing.

        Raises:
            ValueError: a passage of no token.
        """
        told = [list(row) if isinstance(row, Sequence) else row for row in lengths]
        rows: list[Any] = told if told and isinstance(told[0], list) else [told]
        if not all(row and min(row) > 0 for row in rows):
            raise UserError(f"passages take one or more lengths of at least 1, got {lengths}")
        most = max(len(row) for row in rows)
        before, self._lengths = self._lengths, torch.tensor(
            [row + [0] * (most - len(row)) for row in rows], dtype=torch.long
        )
        try:
            yield
        finally:
            self._lengths = before

    def pattern(self, tokens: Tokens) -> Mask | None:
        """Blocks by `passages`; None outside of it, and where all tokens are the question's."""
        if self._lengths is None:
            return None
        ends = self._lengths.to(tokens.device).cumsum(-1)
        if tokens.batch % len(ends):
            raise UserError(f"passages of {len(ends)} rows were told, and the model reads {tokens.batch}")
        ranks = tokens.ranks
        ends = ends.repeat_interleave(max(tokens.batch, len(ranks)) // len(ends), 0)
        ranks = ranks.expand(len(ends), -1).contiguous()
        last = ranks >= ends[:, -1:]
        if bool(last[:, tokens.offset :].all()):
            return None
        return block_mask(torch.searchsorted(ends, ranks, right=True), last)

    # The cache -------------------------------------------------------------------------------------

    def context(self, passages: Sequence[Int[Tensor, " tokens"]]) -> DynamicCache:
        """The cache of a prompt that begins with these passages; to go on with, and to be kept by you.

        Those that were read before, by this model as it is now, are not read again.

        Raises:
            ValueError: the adapter is in no model, no passage, an empty one, or one that the folder
                holds for another model.
        """
        model = self._injected("context()").model
        if not passages or not all(p.ndim == 1 and len(p) for p in passages):
            raise UserError(f"context takes passages of ids [tokens], got {[*map(_shape, passages)]}")
        rotations, about = self._rotations(model), _about(model)
        if self._of != (now := {**about, "device": model.device}):
            self._known, self._of = {}, now
        found = [self._states(model, about, passage) for passage in passages]
        starts = torch.tensor([0, *map(len, passages)]).cumsum(0).tolist()
        cache = DynamicCache()
        for layer, rotary in enumerate(rotations):
            keys, values = zip(*(states[layer] for states in found), strict=True)
            if rotary is not None:
                keys = tuple(moved(rotary, k, by) for k, by in zip(keys, starts, strict=False))
            cache.layers.append(filled(DynamicLayer(), torch.cat(keys, 2), torch.cat(values, 2)))
        return cache

    def _states(self, model: Any, about: dict[str, Any], passage: Tensor) -> States:
        """Keys and values of a passage from position 0: known, in the folder, or read now."""
        ids = tuple(passage.tolist())
        if ids not in self._known:
            path = None if self.folder is None else _path(self.folder, ids)
            if path is not None and path.exists():
                self._known[ids] = _load(path, about, model.device)
            else:
                self._known[ids] = self._read(model, passage)
                if path is not None:
                    _save(path, self._known[ids], about)
        return self._known[ids]

    def _read(self, model: Any, passage: Tensor) -> States:
        before, self._lengths = self._lengths, None  # it is a text of its own
        training, cache, base = model.training, DynamicCache(config=model.config), model.base_model
        try:
            with torch.no_grad():
                base.eval()(passage[None].to(model.device), use_cache=True, **with_cache(base, cache))
        finally:
            self._lengths = before
            base.train(training)
        return [(layer.keys, layer.values) for layer in cache.layers]

    # Training --------------------------------------------------------------------------------------

    def trainable(self) -> dict[str, nn.Parameter]:
        """Every weight of the model."""
        return dict(self._injected("trainable()").model.named_parameters())

    def loss(
        self, model: Any, ids: Int[Tensor, "batch tokens"], progress: float
    ) -> Float[Tensor, ""]:
        """Loss of the last block: the mean over the two modes.

        Raises:
            ValueError: texts of fewer tokens than blocks.
        """
        size = ids.shape[1] // self.blocks
        if not size:
            raise UserError(f"blocks={self.blocks} needs as many tokens, got texts of {ids.shape[1]}")
        labels = ids.clone()
        labels[:, : size * (self.blocks - 1)] = -100
        given = {"input_ids": ids, "labels": labels, "use_cache": False}
        with self.passages([size] * (self.blocks - 1)):
            apart: Tensor = model(**given).loss
        whole: Tensor = model(**given).loss
        return (apart + whole) / 2

    def folded(self) -> dict[str, Tensor]:
        """The tuned weights; to put passages in prompts, inject this adapter again."""
        return {name: weight.detach() for name, weight in self.trainable().items()}


def _shape(passage: Any) -> Any:
    return list(getattr(passage, "shape", [type(passage).__name__]))


def _path(folder: str, ids: tuple[int, ...]) -> Path:
    return Path(folder) / f"{hashlib.sha256(repr(ids).encode()).hexdigest()[:32]}.safetensors"


def _about(model: Any) -> dict[str, Any]:
    """What tells the model from others, and by numbers of each of its weights from its tuned self."""
    sampled = [
        p.detach().flatten()[:: max(1, p.numel() // SAMPLED)][:SAMPLED].float().cpu()
        for p in model.parameters()
    ]  # fmt: skip
    digest = hashlib.sha256(torch.cat(sampled).numpy().tobytes()).hexdigest()[:16]
    dtype = str(model.dtype).removeprefix("torch.")
    return {**fingerprint(model), "weights": digest, "dtype": dtype}


def _save(path: Path, states: States, about: dict[str, Any]) -> None:
    """Write a passage, at once or not at all.

    Raises:
        ValueError: it cannot be written.
    """
    tensors = {
        f"{n}.{name}": x.contiguous() for n, pair in enumerate(states)
        for name, x in zip(("keys", "values"), pair, strict=True)
    }  # fmt: skip
    told = json.dumps({"format": FORMAT, "model": about})
    partial = path.with_name(path.name + ".writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata={"attlas": told})
        partial.replace(path)
    except OSError as error:
        raise UserError(f"cannot write the passage to {path}: {error.strerror}") from error


def _load(path: Path, about: dict[str, Any], device: torch.device) -> States:
    """What `_save` wrote.

    Raises:
        ValueError: a damaged file, or one of another model, naming both sides.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            told = json.loads((file.metadata() or {}).get("attlas", "null"))
            if not isinstance(told, dict) or told.get("format") != FORMAT:
                raise UserError(f"{path} is no passage stored by attlas")
            for what, here in about.items():
                if told["model"].get(what) != here:
                    raise UserError(
                        f"the passage at {path} is of another model: its {what} is "
                        f"{told['model'].get(what)}, this model's is {here}; take another folder="
                    )
            names = range(len(file.keys()) // 2)
            return [(file.get_tensor(f"{n}.keys"), file.get_tensor(f"{n}.values")) for n in names]
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"the stored passage at {path} is damaged: {error}") from error
