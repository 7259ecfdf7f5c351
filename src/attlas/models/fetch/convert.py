"""From what a package carries to a folder that `from_pretrained` reads: once, and whole or not at all."""

from __future__ import annotations

import errno
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError

from attlas.errors import UserError
from attlas.models.fetch.catalogue import Model, cache_folder
from attlas.models.fetch.unpack import check_source
from attlas.models.fetch.wheels import no_room

#: Lists the files of a finished model with their sizes, so that a damaged one is noticed.
MANIFEST = "attlas.json"

#: What reads each form, and the extra that brings it.
READERS = {"gguf": "gguf", "onnx": "onnx"}


def whole(folder: Path) -> bool:
    """Whether every file of the model is there with its size."""
    try:
        sizes: dict[str, int] = json.loads((folder / MANIFEST).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def check_reader(model: Model) -> None:
    """Nothing, if what reads the model's form is installed.

    Raises:
        UserError: it is not; names the extra.
    """
    reader = READERS.get(model.form)
    if reader is not None and importlib.util.find_spec(reader) is None:
        raise UserError(
            f"{model.name} comes as {model.form.upper()}, which the package {reader} reads; "
            f"pip install 'attlas[{model.name}]'"
        )


def finish(
    model: Model,
    source: Path,
    folder: Path,
    notices: Sequence[Path] = (),
    beside: Path | None = None,
) -> None:
    """Convert `source` into `folder`, which appears complete or not at all.

    Args:
        model: which one.
        source: its GGUF or ONNX file, or its folder.
        folder: where it shall stand; replaced when it is there.
        notices: files to keep beside it.
        beside: a folder on the cache's disk to work in; the cache unless given.

    Raises:
        UserError: what reads the form is missing, or no room, or no right to write.
    """
    check_reader(model)
    work = _work_folder(model, beside or cache_folder())
    try:
        if model.form == "gguf":
            _from_gguf(source, work)
        elif model.form == "onnx":
            from attlas.models.fetch.dinov2 import write

            write(source, work)
        else:
            shutil.copytree(source, work, dirs_exist_ok=True)
        for notice in notices:
            shutil.copyfile(notice, work / notice.name)
        sizes = {
            path.relative_to(work).as_posix(): path.stat().st_size
            for path in sorted(work.rglob("*"))
            if path.is_file()
        }
        (work / MANIFEST).write_text(json.dumps(sizes))
        shutil.rmtree(folder, ignore_errors=True)
        try:
            work.rename(folder)
        except OSError:
            if not whole(folder):  # else another process has just finished the same work
                raise
    except (OSError, SafetensorError) as error:
        raise cannot_write(model, error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def join(model: Model, pieces: Sequence[Path], into: Path) -> Path:
    """The pieces one after the other as the model's source file.

    Raises:
        UserError: the whole has another hash.
    """
    target = into / model.source
    with open(target, "wb") as whole_file:
        for piece in pieces:
            with open(piece, "rb") as file:
                shutil.copyfileobj(file, whole_file, 1 << 20)
    check_source(model, target)
    return target


def cannot_write(model: Model, error: Exception) -> UserError:
    """What to do about an error while the cache was written."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return no_room(model)
    if isinstance(error, OSError) and error.errno is not None:
        return UserError(
            f"cannot write to {cache_folder()} ({error.strerror}); set XDG_CACHE_HOME to a folder "
            "that can be written"
        )
    return UserError(
        f"cannot convert {model.name} in {cache_folder()}: {error}; run `attlas fetch {model.name}`, "
        "or set XDG_CACHE_HOME to another folder"
    )


def _work_folder(model: Model, parent: Path) -> Path:
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=parent, prefix=f".{model.name}-"))
    except OSError as error:
        raise cannot_write(model, error) from error


def _from_gguf(file: Path, into: Path) -> None:
    """Dequantise to float32 with Transformers' reader, and save what it made."""
    import torch

    from attlas.hf import models as transformers

    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    read = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    if hasattr(read.config, "quantization_config"):
        del read.config.quantization_config
    # A model read from GGUF counts as quantized and cannot be saved; its twin can.
    model = type(read)(read.config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(into)
    if read.config.model_type == "gemma3_text":
        from attlas.models.fetch import gemma_tokenizer

        gemma_tokenizer.read(file).save_pretrained(into)
    else:
        transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(into)
