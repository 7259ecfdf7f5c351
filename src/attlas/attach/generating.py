"""What a session knows of `generate`: where the prompt ends, and which tokens are taken back.

Forward calls alone do not tell. A prompt may come in chunks (`prefill_chunk_size`). Assisted decoding
(`prompt_lookup_num_tokens`, `assistant_model`) puts its first candidates behind the prompt in one call,
and takes back those that were wrong. So for the time of a session the model's own `generate` is looked
at; the call of prompt and candidates is made as two, one behind the other, so that every part sees the
prompt as it sees it without candidates; and parts are told what was taken back. A call for which memory
is short is made as several likewise.
"""

from __future__ import annotations

import inspect
from copy import copy
from functools import wraps
from types import MethodType
from typing import Any

from torch import Tensor, nn

from attlas.attach import hooks, prefill
from attlas.attach.state import Attachment
from attlas.errors import UserError
from attlas.hf.caches import cache_in, cache_of, own_tokens
from attlas.storage.layer import StoredLayer

#: What of assisted decoding runs the attached model in other ways than by its own calls.
OTHER_WAYS = ("assistant_early_exit", "use_mtp")


def watch(held: Attachment) -> list[Any]:
    """Look at `generate` and at the base model's calls; to be done before any other hook."""
    base: Any = held.tower.module
    names = [name for name in inspect.signature(base.forward).parameters if name != "self"]
    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = dict(zip(names, args, strict=False)) | kwargs
        cache = own_tokens(cache_in(arguments, type(base))[1])
        held.here.done = []
        settle(held, cache)
        (*first, last), until = _calls(held, arguments, cache)
        if not first:
            return None
        held.here.done = _made(held, first, until)
        return (), last

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        cache = own_tokens(cache_of(output)) if held.parts else None
        if cache is not None:
            held.read = cache, int(cache.get_seq_length())
        done, held.here.done = held.here.done, []
        return prefill.joined([*done, output]) if done else None

    around = [m for m in (*held.tower.outer, base) if hasattr(m, "generate") and not held.plain]
    return [
        hooks.before(base, before), hooks.after(base, after),
        *(_around_generate(held, model) for model in around),
    ]  # fmt: skip


def settle(held: Attachment, cache: Any = None) -> None:
    """Tell every part which of the tokens that it saw were taken back since the last call.

    Args:
        held: the session.
        cache: of the call that begins; None when none does.

    Raises:
        ValueError: a part that cannot take them back, by name.
    """
    if held.read is None:
        return
    known, seen = held.read
    now = int(known.get_seq_length())
    if cache is not None and cache is not known:
        held.read = None  # another text
    elif 0 < now < seen:
        held.read = known, now
        for part in held.parts:
            part.take_back(now)


def prompt_goes_on(held: Attachment, seen: int) -> bool:
    """Whether more of the prompt comes behind the tokens seen."""
    if held.here.until is not None and seen < held.here.until:
        return True
    return held.chunked if held.prompt is None else seen < held.prompt


def _calls(
    held: Attachment, arguments: dict[str, Any], cache: Any
) -> tuple[list[dict[str, Any]], int | None]:
    """The calls to make in place of one, and the tokens seen at which a prompt cut in pieces ends.

    They are one of the prompt and one of its candidates, or one for each piece that memory allows.
    """
    count = _candidates(held, arguments, cache)
    if not count:
        found = prefill.pieces(held, arguments)
        past = 0 if cache is None else int(cache.get_seq_length())
        return found, past + prefill.length(arguments) if len(found) > 1 else None
    mask = arguments.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        raise UserError(
            "assisted decoding beside attlas's parts takes a 2-D attention_mask, got one of "
            + (f"{mask.ndim} dimensions" if isinstance(mask, Tensor) else type(mask).__name__)
        )
    whole = prefill.length(arguments)
    borders = (0, whole - count), (whole - count, whole)
    return [prefill.cut(arguments, *border, whole) for border in borders], None


def _made(held: Attachment, calls: list[dict[str, Any]], until: int | None) -> list[Any]:
    """What the first of several calls give, which are told where the prompt ends."""
    base: Any = held.tower.module
    cache = own_tokens(cache_in(calls[0], type(base))[1])
    before = held.here.until
    held.here.until = before if until is None else until
    found = []
    try:
        for call in calls:
            found.append(base(**call))
            for layer in () if cache is None else cache.layers:
                if isinstance(layer, StoredLayer):
                    layer.promised = until or 0
                # Until they are cropped they keep more than their masks tell, and in 5.17 give it too.
                if getattr(layer, "is_sliding", False) and getattr(layer, "record_past", False):
                    layer.crop(0)
    finally:
        held.here.until = before
    return found


def _around_generate(held: Attachment, model: Any) -> Any:
    """Put a look at its arguments around a model's `generate`, until it is undone."""
    own, original, kind = vars(model).get("generate"), model.generate, type(model)

    @wraps(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is not model:  # a copy that was made meanwhile
            return kind.generate(self, *args, **kwargs)
        given = inspect.signature(kind.generate).bind_partial(self, *args, **kwargs).arguments
        by_place = dict(zip(("inputs", "generation_config"), given.pop("args", ()), strict=False))
        asked = given.pop("kwargs", {}) | by_place | given  # of a wrapper all is args and kwargs
        config = _config(self, asked)
        chunked = getattr(config, "prefill_chunk_size", None) is not None
        held.assisted = _is_assisted(held, config, asked)
        held.prompt = _prompt(held, self, asked) if chunked or held.assisted else None
        try:
            found = original(*args, **kwargs)
        finally:
            held.prompt, held.assisted = None, False
        settle(held)
        return found

    # A method of the object, so that a copy of the model is given its own.
    model.generate = MethodType(generate, model)

    def undo() -> None:
        if own is None:
            del model.generate
        else:
            model.generate = own

    return undo


def _config(model: Any, asked: dict[str, Any]) -> Any:
    """The configuration that generate will go by: the model's, what was given over it."""
    config = copy(model.generation_config)
    given = asked.get("generation_config")
    for settings in ({} if given is None else vars(given), asked):
        for name, value in settings.items():
            if value is not None and hasattr(config, name):
                setattr(config, name, value)
    return config


def _is_assisted(held: Attachment, config: Any, asked: dict[str, Any]) -> bool:
    """Whether candidates are drafted and taken back.

    Raises:
        ValueError: and a part cannot go along, by name.
    """
    assistant = asked.get("assistant_model")
    if config.get_generation_mode(assistant) != "assisted_generation":
        return False
    for name in OTHER_WAYS:
        if getattr(config, name, None):
            raise UserError(
                f"attach cannot honour {name}: assisted decoding by the attached model itself runs it in "
                "other ways than by its own calls; give an assistant_model or prompt_lookup_num_tokens"
            )
    if isinstance(assistant, nn.Module) and any(m in held.tower.layers for m in assistant.modules()):
        raise UserError(
            "attach cannot honour assistant_model: it is the attached model itself; load it a second time"
        )
    for part in held.parts:
        if not part.rewinds:
            raise UserError(
                f"{type(part).__name__} cannot take tokens back, which assisted decoding "
                "(assistant_model, prompt_lookup_num_tokens) does with every candidate that was wrong; "
                "generate without it"
            )
    return True


def _prompt(held: Attachment, model: Any, asked: dict[str, Any]) -> int | None:
    """Tokens of the prompt, those included that a cache holds already; None where nothing tells.

    Raises:
        ValueError: assisted decoding of a whole text whose beginning a cache holds.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        return None
    given = [asked.get(name) for name in ("inputs_embeds", "inputs", "input_ids")]
    tokens = next((t for t in given if isinstance(t, Tensor) and t.ndim > 1), None)
    if tokens is None:
        return None
    cache = cache_in(asked, type(model))[1]
    past = 0 if cache is None else int(own_tokens(cache).get_seq_length())
    # Behind a cache the whole text is given, or what is new alone.
    mask = asked.get("attention_mask")
    whole = max(tokens.shape[1], mask.shape[1] if isinstance(mask, Tensor) else 0)
    if held.assisted and 0 < past < tokens.shape[1] == whole:
        raise UserError(
            f"the cache holds {past} of the {whole} tokens given, and Transformers' assisted decoding "
            "would read them again behind it; give the new tokens alone, with the attention_mask of all"
        )
    return whole if whole > past else past + tokens.shape[1]


def _candidates(held: Attachment, arguments: dict[str, Any], cache: Any) -> int:
    """How many of a call's tokens are candidates behind a prompt that comes with them."""
    if not held.assisted or held.prompt is None:
        return 0
    past = 0 if cache is None else int(cache.get_seq_length())
    return max(0, past + prefill.length(arguments) - held.prompt) if past < held.prompt else 0
