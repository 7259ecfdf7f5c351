"""load: a pretrained model by name, path or id; those of `attlas fetch` need no network.

A model that travels in a Python package is found in the user's cache, where `attlas fetch` puts it,
or in the package, where that is installed; a GGUF or ONNX file in a package is converted once to
safetensors in the cache.
"""

from __future__ import annotations

import importlib.util
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attlas.errors import UnknownName, UserError
from attlas.models.fetch.catalogue import MODELS, Model, cache_folder
from attlas.models.fetch.convert import MANIFEST, finish, join, whole

__all__ = ["cache_folder", "load", "load_config", "load_tokenizer"]


def load(model: str | Path | nn.Module) -> Any:
    """A pretrained Transformers model, ready for `attach`.

    Args:
        model: "smollm2" (SmolLM2-135M-Instruct), "gemma3-270m" (Gemma 3 270M), "minilm"
            (all-MiniLM-L6-v2) or "vit" (a DINOv2 ViT-S/14), in float32; a folder, a Hugging Face
            id, or a model, which is given back as it is.

    Raises:
        ValueError: a model that was not fetched, or nothing can be loaded from the path or id; says
            what to do.
    """
    if isinstance(model, nn.Module):
        return model
    from attlas.hf import models as transformers

    name = str(model)
    known = MODELS.get(name)
    if known is None:
        folder = _folder_or_id(name)
        try:
            return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        except Exception as error:
            raise _cannot(name, error) from error
    kind = getattr(transformers, known.auto)
    path = _here(known)
    try:
        loaded = kind.from_pretrained(path, dtype=torch.float32)
    except Exception as error:
        # Sizes were right and still it does not load: the conversion is damaged, make it anew.
        if not (path / MANIFEST).exists():
            raise _cannot(name, error) from error
        (path / MANIFEST).unlink()
        loaded = kind.from_pretrained(_here(known), dtype=torch.float32)
    return loaded.eval()


def load_tokenizer(model: str | Path) -> Any:
    """The tokenizer of a model that `load` takes by name, path or id.

    Raises:
        ValueError: as `load`.
    """
    from attlas.hf import models as transformers

    name = str(model)
    known = MODELS.get(name)
    if name == "vit":
        raise UserError("vit reads pictures and has no tokenizer; load('vit') gives the model")
    path = _folder_or_id(name) if known is None else _here(known)
    try:
        return transformers.AutoTokenizer.from_pretrained(path)
    except Exception as error:
        raise _cannot(name, error) from error


def load_config(model: str | Path) -> Any:
    """The configuration of a model that `load` takes by name, path or id; no weights are read.

    Raises:
        ValueError: as `load`.
    """
    from attlas.hf import models as transformers

    name = str(model)
    known = MODELS.get(name)
    path = _folder_or_id(name) if known is None else _here(known)
    try:
        return transformers.AutoConfig.from_pretrained(path)
    except Exception as error:
        raise _cannot(name, error) from error


def _folder_or_id(name: str) -> str:
    """The name of a folder that is there, or one that the Hub may have.

    Raises:
        ValueError: a folder that is not there, which the Hub would be asked for in vain.
    """
    path = Path(name).expanduser()
    if path.exists():
        return str(path)
    pieces = name.split("/")
    if len(pieces) == 1 and not name.startswith(("~", ".")):
        raise UnknownName("model", name, MODELS)
    folder = len(pieces) != 2 or not all(pieces) or name[0] in "~." or Path(pieces[0]).is_dir()
    if folder:
        raise UserError(
            f"there is no folder {name!r}; give one with a Transformers model, a Hugging Face id "
            f"such as 'owner/name', or one of {sorted(MODELS)}"
        )
    return name


def _here(model: Model) -> Path:
    """The folder to read the model from: fetched, installed, or converted now.

    Raises:
        UserError: it is neither fetched nor installed, or only half.
    """
    folder = model.folder()
    if whole(folder):
        return folder
    pieces = _installed(model)
    if pieces is not None:
        return pieces[0] if model.form == "folder" else _converted(model, pieces)
    if folder.exists() or model.downloads.exists():
        raise UserError(f"{model.name} is only half here; run `{_command(model)}`")
    raise UserError(f"{model.name} is not here; run `{_command(model)}`")


def _command(model: Model) -> str:
    return f"attlas fetch {model.name}" + (" --accept-terms" if model.terms else "")


def _installed(model: Model) -> list[Path] | None:
    """The model's files in packages of this environment, or None where one is missing."""
    pieces = []
    for wheel in model.wheels:
        spec = importlib.util.find_spec(wheel.module)
        if spec is None or spec.origin is None:
            return None
        if wheel.holds:
            pieces.append(Path(spec.origin).parent.parent / wheel.holds)
    return pieces if all(piece.exists() for piece in pieces) else None


def _converted(model: Model, pieces: list[Path]) -> Path:
    """The folder with the converted model, made now when missing or damaged."""
    folder = model.folder(metadata.version(model.wheels[0].package))
    if whole(folder):
        return folder
    if len(pieces) == 1:
        finish(model, pieces[0], folder)
        return folder
    with tempfile.TemporaryDirectory() as work:
        finish(model, join(model, pieces, Path(work)), folder)
    return folder


def _cannot(name: str, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UserError(
        f"cannot load {name!r}: {reason}; give a folder with a Transformers model, a Hugging Face "
        f"id, or one of {sorted(MODELS)}"
    )
