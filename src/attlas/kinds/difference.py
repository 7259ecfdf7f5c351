"""Saved differences: what an adapter changed, as a safetensors file that tells of which model it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from attlas.catalog import registry
from attlas.catalog.kinds import ADAPTER
from attlas.errors import UserError
from attlas.storage.files import fingerprint

FORMAT = "attlas-adapter-1"


def save(adapter: Any, base: Mapping[str, Any], path: str | Path) -> Path:
    """Write an injected adapter's difference; `Adapter.save` is the way to it.

    Raises:
        ValueError: an option that JSON cannot hold, an adapter that is not registered, or a path that
            cannot be written.
    """
    path = Path(path)
    if registry.entry_of(type(adapter)) is None:
        raise UserError(
            f"{adapter.name} is not registered, so nothing could load its difference; "
            "@attlas.mechanism(name) registers it"
        )
    about = {"format": FORMAT, "name": adapter.name, "options": adapter.options, "model": base}
    # Clones, since safetensors refuses tensors that share memory.
    tensors = {n: t.detach().cpu().clone().contiguous() for n, t in adapter.difference().items()}
    partial = path.with_name(path.name + ".writing")
    try:
        told = json.dumps(about)
    except TypeError as error:
        raise UserError(f"options of {adapter.name} cannot be saved: {error}") from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata={"attlas": told})
        partial.replace(path)
    except OSError as error:
        raise UserError(f"cannot write the difference to {path}: {error.strerror}") from error
    return path


def load(path: str | Path, model: Any) -> tuple[Any, dict[str, Tensor]]:
    """The adapter that a file tells of, and its tensors; `Adapter.load` is the way to it.

    Raises:
        ValueError: no such file, a damaged one, or one of another model, naming both sides.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("attlas", "null"))
            if not isinstance(about, dict) or about.get("format") != FORMAT:
                raise UserError(f"{path} holds no difference saved by an adapter of attlas")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        name, options, base = about["name"], about["options"], about["model"]
    except FileNotFoundError:
        raise UserError(f"there is no saved difference at {path}") from None
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"the saved difference at {path} is damaged: {error}") from error
    here = fingerprint(model)
    for what in here:
        if base.get(what) != here[what]:
            raise UserError(
                f"the difference at {path} is of another model: its {what} is {base.get(what)}, "
                f"this model's is {here[what]}"
            )
    made = registry.make(registry.find(name, ADAPTER).name, **options)
    return made, tensors
