"""Injection: what an adapter did to a model, and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from attlas.errors import UserError
from attlas.storage.files import fingerprint

#: Where a model carries its adapters; a deep copy of the model carries copies of them.
CARRIED = "attlas_adapters"


@runtime_checkable
class Injectable(Protocol):
    """What an injection and a saved difference need to know of an adapter, see `Adapter`."""

    injection: Injection | None

    @property
    def name(self) -> str:
        """Under which it is registered."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters to train."""

    def difference(self) -> Mapping[str, Tensor]:
        """All that tells the changed model from the one before."""


class Injection:
    """An adapter in a model: a context manager, or to be called to undo it.

    Attributes:
        adapter: that made it.
        model: that was changed.
        base: what tells the model from others (`attlas.storage.files.fingerprint`).
        merged: whether the change went into the weights for good.
    """

    def __init__(self, adapter: Injectable, model: Any) -> None:
        self.adapter, self.model = adapter, model
        self.base = fingerprint(model)
        self.merged = self.undone = False
        self.replaced: dict[str, tuple[nn.Module, nn.Module]] = {}
        self.added: list[str] = []
        self._handles: list[Any] = []
        self._flags = [(p, p.requires_grad) for p in model.parameters()]
        self._values: list[tuple[nn.Parameter, Tensor]] = []
        self._where = (model.device, model.dtype)
        adapters = [*adapters_of(model), adapter]
        setattr(model, CARRIED, adapters)
        model.save_pretrained = _Refusal([one.name for one in adapters])

    def replace(self, path: str, module: nn.Module) -> None:
        """Put a module where another stands; the new one may hold the old one.

        Raises:
            ValueError: another adapter has replaced it, what is around it or what is in it.
        """
        for other in adapters_of(self.model):
            if other is self.adapter or other.injection is None:
                continue
            for known in other.injection.replaced:
                if f"{path}.".startswith(f"{known}.") or f"{known}.".startswith(f"{path}."):
                    raise UserError(
                        f"{self.adapter.name} does not go together with {other.name}: it replaces "
                        f"{path}, and {other.name} has replaced {known}; undo one of them"
                    )
        old = self.model.get_submodule(path)
        module.train(old.training)
        self.replaced[path] = (old, module)
        self._put(path, module)

    def add(self, name: str, module: nn.Module) -> None:
        """Put a module of the adapter's own into the model, which moves and copies it.

        Raises:
            ValueError: the model has a module of that name.
        """
        if name in self.model._modules:
            raise UserError(f"{self.adapter.name} cannot be added: the model has a {name} already")
        self.model.add_module(name, module.train(self.model.training))
        self.added.append(name)

    def hook(self, handle: Any) -> None:
        """Remember a hook's handle, to be removed. A hook is a bound method, so that a deep copy of
        the model gets a hook of its own."""
        self._handles.append(handle)

    def settle(self) -> None:
        """Freeze all but what adapters train, and keep the values of what belongs to the model."""
        chosen = {id(p) for one in adapters_of(self.model) for p in one.trainable().values()}
        known = {id(p) for p, _ in self._flags}
        for parameter in self.adapter.trainable().values():
            if id(parameter) in known:
                self._values.append((parameter, parameter.detach().clone()))
            parameter.requires_grad_(True)
        for parameter in self.model.parameters():
            if id(parameter) not in chosen:
                parameter.requires_grad_(False)

    def undo(self) -> None:
        """Restore the model as it was before; nothing if that is done already.

        Raises:
            ValueError: another adapter was injected after this one, or it was merged.
        """
        if self.merged:
            raise UserError(f"{self.adapter.name} was merged into the weights; that is for good")
        if self.undone:
            return
        adapters = adapters_of(self.model)
        if adapters[-1] is not self.adapter:
            raise UserError(
                f"{adapters[-1].name} was injected after {self.adapter.name}; undo that first"
            )
        for handle in self._handles:
            handle.remove()
        for name in self.added:
            delattr(self.model, name)
        for path, (old, new) in reversed(self.replaced.items()):
            old.train(new.training)
            self._put(path, self._moved(old))
        with torch.no_grad():
            for parameter, value in self._values:
                parameter.copy_(value)
                parameter.grad = None
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        self._uncarry(adapters[:-1])
        self.adapter.injection, self.undone = None, True

    __call__ = undo

    def __enter__(self) -> Injection:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.merged:
            self.undo()

    def _put(self, path: str, module: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(self.model.get_submodule(parent), name, module)

    def _moved(self, old: nn.Module) -> nn.Module:
        """A module that was out of the model, where the model has gone meanwhile."""
        device, dtype = self.model.device, self.model.dtype
        if device != self._where[0]:
            old.to(device)
        return old.to(dtype) if dtype != self._where[1] else old

    def _uncarry(self, others: list[Injectable]) -> None:
        if others:
            setattr(self.model, CARRIED, others)
            self.model.save_pretrained = _Refusal([one.name for one in others])
        else:
            delattr(self.model, CARRIED)
            del self.model.save_pretrained


class _Refusal:
    """Stands for a model's `save_pretrained`, which would write what Transformers cannot load."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __call__(self, *args: object, **options: object) -> None:
        raise UserError(
            f"save_pretrained would write a model that Transformers cannot load while "
            f"{' and '.join(self.names)} is injected; merge() first, or save() the difference alone"
        )


def adapters_of(model: Any) -> list[Injectable]:
    """The adapters that are in a model, in the order of their injection."""
    return list(getattr(model, CARRIED, ()))


def refuse(adapter: Injectable, model: Any) -> None:
    """Refuse what no adapter can work on.

    Raises:
        TypeError: no Transformers model.
        ValueError: an adapter in use, one of the same kind in the model, or a model that is attached
            or carries adapters of another library.
    """
    from attlas.attach.state import ATTACHED
    from attlas.hf.models import PreTrainedModel

    name = adapter.name
    if adapter.injection is not None:
        raise UserError(f"{name}: this adapter is in a model already; undo that, or make another")
    peft = any(type(m).__module__.partition(".")[0] == "peft" for m in _modules(model))
    if peft:
        raise UserError(
            f"{name} cannot be injected into a model that PEFT has changed; merge_and_unload() first"
        )
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"{name} takes a Transformers model, got {type(model).__name__}; of a wrapped or "
            "compiled model give what is inside"
        )
    if any(type(one) is type(adapter) for one in adapters_of(model)):
        raise UserError(f"{name} is in this model already; undo or merge that first")
    if any(module in ATTACHED for module in model.modules()):
        raise UserError(f"{name} cannot be injected into an attached model; inject before attach()")


def _modules(model: Any) -> list[nn.Module]:
    return list(model.modules()) if isinstance(model, nn.Module) else []
