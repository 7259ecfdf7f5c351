"""The residual stream of a model: what enters a block, and what attention and MLP add to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from attlas.attach import hooks
from attlas.attach.call import Site
from attlas.attach.own import own_layers
from attlas.attach.state import OUTSIDE, Attachment
from attlas.errors import UnknownName, UserError

POINTS = ("residual", "attention", "mlp", "final")
#: What of an attention call is recorded and replaced beside them, see `activations`.
OF_CALLS = ("heads", "q", "k", "v")
#: Names that models give to the attention and to the MLP of a block.
_NAMES = {
    "attention": ("self_attn", "attn", "attention", "self_attention"),
    "mlp": ("mlp", "feed_forward", "ffn", "block_sparse_moe"),
}


def watch(held: Attachment) -> list[Any]:
    """Hooks at the points that parts ask for, and before the projections that they change.

    Raises:
        ValueError: a point that this model cannot give, by the names of the part and the point.
    """
    wanted = {point: [p for p in held.parts if point in p.points] for point in POINTS}
    for part in held.parts:
        for point in part.points:
            if point not in POINTS:
                raise UnknownName(f"point of {type(part).__name__}", point, POINTS)
    projects = held.overriding("project")
    if not projects and not any(wanted.values()):
        return []
    found = dict(blocks(held.tower.module))
    undo: list[Any] = []
    for point, parts in wanted.items():
        for number, block in found.items() if parts else ():
            if point == "final" and number != max(found):
                continue
            undo.append(_listen(held, number, point, block, parts))
        if parts and not found:
            raise _cannot(held, parts[0], point, "its blocks cannot be told apart")
    for number, block in found.items() if projects else ():
        module = _child(held, block, "attention", projects[0])
        undo.append(_before(module, _through(held, projects, number, "project", module)))
    if projects and not found:
        raise _cannot(held, projects[0], "project", "its blocks cannot be told apart")
    return undo


def _listen(
    held: Attachment, number: int, point: str, block: nn.Module, parts: list[Any]
) -> Callable[[], Any]:
    if point == "residual":
        return _before(block, _through(held, parts, number, point, block))
    module = block if point == "final" else _child(held, block, point, parts[0])
    return _after(module, _through(held, parts, number, point, module))


def _through(
    held: Attachment, parts: list[Any], number: int, point: str, module: nn.Module
) -> Callable[[Tensor], Tensor]:
    """What the parts make of something that passes."""
    hook = "project" if point == "project" else "stream"

    def change(x: Tensor) -> Tensor:
        if held.forward_pass is None:
            raise UserError(OUTSIDE)
        at = Site(number, point, module, held.forward_pass)
        for part in parts:
            if part.where.covers(number):
                changed = getattr(part, hook)(at, x)
                x = x if changed is None else changed
        return x

    return change


def _before(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
    """Change what a module is given: its first argument, or `hidden_states`."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args and isinstance(args[0], Tensor):
            return (change(args[0]), *args[1:]), kwargs
        name = "hidden_states"
        return args, kwargs | {name: change(kwargs[name])}

    return hooks.before(module, before)


def _after(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
    """Change what a module gives: a tensor, or the first of several."""

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return change(output)
        return (change(output[0]), *output[1:])

    return hooks.after(module, after)


def blocks(base: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    """(number, block) of each block with an attention, in a list of blocks; none where two lists
    have the same numbers."""
    found: dict[int, nn.Module] = {}
    ours = set(own_layers(base))
    for name, module in base.named_modules():
        last = name.rpartition(".")[2]
        attention = [getattr(module, n) for n in _NAMES["attention"] if hasattr(module, n)]
        if ours and not any(child in ours for child in attention):
            continue  # the side of an encoder-decoder that is not attached to
        if last.isdigit() and attention:
            if int(last) in found:
                return
            found[int(last)] = module
    yield from sorted(found.items())


def _child(held: Attachment, block: nn.Module, what: str, part: Any) -> nn.Module:
    """The attention or the MLP of a block, whose output is what it adds to the stream."""
    found = child(block, what)
    if found is None:
        raise _cannot(held, part, what, "its blocks have no such module")
    if hasattr(getattr(found, "output", None), "LayerNorm"):
        raise _cannot(held, part, what, "that module adds the stream itself")
    return found


def child(block: nn.Module, what: str) -> nn.Module | None:
    """The "attention" or the "mlp" of a block, by the names that models give them; None without."""
    named = (getattr(block, name, None) for name in _NAMES[what])
    return next((found for found in named if isinstance(found, nn.Module)), None)


def _cannot(held: Attachment, part: Any, point: str, why: str) -> UserError:
    return UserError(
        f"{type(part).__name__} asks for {point!r}, which {type(held.model).__name__} cannot give: {why}"
    )
