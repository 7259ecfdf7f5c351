"""A session: a model with parts attached, and the way back."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any, Literal

import torch
from torch import nn

from attlas.attach import generating, wiring
from attlas.attach.capturing import Capturing
from attlas.attach.part import Part, Recorder
from attlas.attach.state import Attachment
from attlas.attach.towers import choose, unwrapped
from attlas.catalog import registry
from attlas.errors import UserError
from attlas.hf.interface import PreTrainedModel
from attlas.storage.layer import StoredLayer
from attlas.storage.plain import memory, tensors


def attach(
    model: nn.Module,
    *parts: Part,
    record: Iterable[str | Recorder] = (),
    chunked: bool = False,
    while_decoding: bool = False,
    compile: bool | Literal["auto"] = "auto",
) -> Session:
    """Attach parts to a model for the length of a `with` block.

    Parts compose in the order given: masks are combined, score changes and changes of the heads'
    outputs follow one another. Of the parts that deal with the cache one may evict, one quantize and one
    select, in this order, each working on what those before it left.

    Args:
        model: any Transformers model that calls its attention through `AttentionInterface`, whatever
            wraps it (PEFT, `torch.compile`), or one of attlas's own. Of a model that also reads pictures
            or sound the part that reads tokens and keeps a cache is attached to; of an encoder-decoder
            of ours the decoder's attention to its own tokens.
        parts: cache policies, selections, steerers, patches, recorders.
        record: recorders, or names under which recorders are registered; what they found is
            `session[name]`.
        chunked: the prompt comes in several calls of yours and ends with the first call of a single
            token; cache policies wait for it. A last chunk of one token cannot be told from a generated
            one and is kept in addition to the budget. Not needed for
            `generate(prefill_chunk_size=...)`, which tells where its prompt ends.
        while_decoding: parts keep what they promise of the cache after every call and not only behind
            the first prompt: through long generation, and over the turns of a chat.
        compile: capture the step of one token as a CUDA graph, which waits for no Python: "auto" where it
            can be, `session.why_not_captured` says why where not; True fuses its small operations by
            `torch.compile` first, which takes some ten seconds once, and refuses where it cannot; False
            never does. What a hook or part of yours does in Python on every step needs False.

    Raises:
        ValueError: the model cannot be intercepted, is attached already or has several towers, a part
            cannot work on it, or two parts cannot work on one cache.
        TypeError: something that is no model or no part.
    """
    return Session(model, parts, record, chunked, while_decoding, compile)


class Session(Attachment):
    """An attached model; a context manager made by `attach`.

    Attributes:
        cache: the Transformers cache of the model's last call.
        records: the recorders, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Iterable[Part],
        record: Iterable[str | Recorder],
        chunked: bool,
        while_decoding: bool = False,
        compile: bool | Literal["auto"] = "auto",
    ) -> None:
        if compile not in (True, False, "auto"):
            raise UserError(f"compile is True, False or 'auto', got {compile!r}")
        self.records = _recorders(record)
        given = tuple(_checked_part(part) for part in parts)
        if while_decoding:
            given = tuple(part.continued() for part in given)
        for recorder in (part for part in given if isinstance(part, Recorder)):
            self.records[_free_name(recorder, self.records)] = recorder
        given += tuple(r for r in self.records.values() if r not in given)
        super().__init__(choose(_checked_model(model), given), given, chunked)
        if while_decoding and not self.keepers:
            raise UserError(
                "while_decoding is about parts that compress a cache, and there is none; give one, "
                "such as attlas.make('snapkv', tokens=512)"
            )
        for keeper in self.keepers:
            keeper.check_beside(self.keepers)
        self._capturing = Capturing(self, compile)

    def __enter__(self) -> Session:
        for part in self.parts:
            part.check(self.model)
        wiring.connect(self, self._capturing)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        wiring.disconnect(self)
        if error is None:
            generating.settle(self)

    def __getitem__(self, name: str) -> Any:
        """What the recorder `name` found.

        Raises:
            KeyError: no recorder of that name, with those that there are.
            ValueError: nothing was recorded, since no layer that it looks at has attended.
        """
        if name not in self.records:
            raise KeyError(f"no recorder {name!r}; this session has {sorted(self.records)}")
        generating.settle(self)
        recorder = self.records[name]
        if not any(recorder.where.covers(layer) for layer in self.attended):
            raise UserError(
                f"{name!r} has recorded nothing: "
                + (
                    f"of its layers none has attended; those that have are {sorted(self.attended)}"
                    if self.attended
                    else "the model has not been called inside the with block"
                )
            )
        return recorder.result()

    @property
    def why_not_captured(self) -> str | None:
        """Why the last step of one token was not captured as a CUDA graph; None where it was."""
        return self._capturing.why_not

    @property
    def kv_bytes(self) -> int:
        """Bytes of memory that the cache of the last call keeps: keys, values, slot indices, states."""
        return 0 if self.cache is None else cache_bytes(self.cache)

    @property
    def read_bytes(self) -> int:
        """Bytes of the cache that the last call read, summaries that it chose by included."""
        return 0 if self.cache is None else bytes_read(self.cache)


def cache_bytes(cache: Any) -> int:
    """Bytes of memory that a cache keeps: keys, values, slot indices, states of recurrences."""
    stored = [layer for layer in cache.layers if isinstance(layer, StoredLayer)]
    plain = [layer for layer in cache.layers if not isinstance(layer, StoredLayer)]
    return sum(layer.nbytes for layer in stored) + memory(tensors(plain))


def layer_bytes(layer: Any) -> int:
    """Bytes of memory that one layer of a cache keeps."""
    return layer.nbytes if isinstance(layer, StoredLayer) else memory(tensors(layer))


def bytes_read(cache: Any) -> int:
    """Bytes of a cache that its last step read; of a layer that does not count, all it holds."""
    return sum(getattr(layer, "read_bytes", 0) or layer_bytes(layer) for layer in cache.layers)


def _checked_model(model: Any) -> PreTrainedModel:
    """The Transformers model inside of what wraps it, which may be compiled, but not as one graph."""
    found = unwrapped(model)
    if getattr(vars(model).get("dynamo_ctx"), "fullgraph", False):
        raise UserError(
            "attach cannot work in a model compiled with fullgraph=True, which leaves nothing to listen "
            "to; compile without it, or attach to and call the model that was compiled"
        )
    if torch.__version__ < "2.12" and (
        "dynamo_ctx" in vars(model) or any(m._compiled_call_impl for m in found.modules())
    ):
        raise UserError(
            f"attach cannot work in a compiled model with PyTorch {torch.__version__}, whose compiler "
            "stops at an attached model's configuration; attach to and call the model that was compiled, "
            "or take 2.12"
        )
    return found


def _checked_part(part: Any) -> Part:
    if not isinstance(part, Part):
        hint = f"attlas.make({part!r}, ...)" if isinstance(part, str) else "attlas.make(name, ...)"
        raise TypeError(f"attach takes parts, got {part!r}; {hint} makes one")
    return part


def _recorders(record: Iterable[str | Recorder]) -> dict[str, Recorder]:
    if isinstance(record, (str, Recorder)):
        raise TypeError(f"record takes a list of recorders, got {record!r}; write [{record!r}]")
    found: dict[str, Recorder] = {}
    for item in record:
        recorder = registry.make(item) if isinstance(item, str) else item
        if not isinstance(recorder, Recorder):
            raise TypeError(f"record takes recorders or their names, got {item!r}")
        found[_free_name(recorder, found)] = recorder
    return found


def _free_name(recorder: Recorder, taken: dict[str, Recorder]) -> str:
    """The name it is registered under, else its class's; numbered when taken."""
    entry = registry.entry_of(type(recorder))
    name = type(recorder).__name__ if entry is None else entry.name
    number = sum(known == name or known.startswith(f"{name}#") for known in taken)
    return f"{name}#{number + 1}" if number else name


