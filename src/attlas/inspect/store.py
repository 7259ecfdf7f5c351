"""Findings on the disk, each as soon as it is there: a run that was stopped goes on behind them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from attlas.errors import UserError
from attlas.inspect.subject import Subject
from attlas.kinds.analysis import Findings, Scores, Table


class Store:
    """The folder of an inspection.

    Args:
        folder: made where it is missing.
        key: of what is looked at; findings of another key are made anew.

    Raises:
        ValueError: the folder cannot be written.
    """

    def __init__(self, folder: str | Path, key: str) -> None:
        self.folder, self.key = Path(folder), key
        try:
            (self.folder / "findings").mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK):
                raise PermissionError(13, "Permission denied")
        except OSError as error:
            raise UserError(
                f"cannot write into {self.folder}: {error.strerror}; choose another folder with --out"
            ) from error

    def _paths(self, label: str) -> tuple[Path, Path]:
        name = "".join(c if c.isalnum() or c in "-._" else "_" for c in label)
        at = self.folder / "findings"
        return at / f"{name}.json", at / f"{name}.safetensors"

    def save(self, label: str, found: Findings) -> None:
        """Write what was found; whole or not at all."""
        told, numbers = self._paths(label)
        heads = {f"heads/{name}": scores.values for name, scores in found.heads.items()}
        arrays = {f"arrays/{name}": values for name, values in found.arrays.items()}
        tensors = {name: x.detach().cpu().contiguous().clone() for name, x in (heads | arrays).items()}
        partial = numbers.with_suffix(".partial")
        save_file(tensors, partial)
        os.replace(partial, numbers)
        said = {
            "key": self.key, "label": label,
            "heads": {name: scores.meaning for name, scores in found.heads.items()},
            "arrays": sorted(found.arrays),
            "tables": [[t.title, list(t.columns), [list(row) for row in t.rows]] for t in found.tables],
            "says": list(found.says),
        }  # fmt: skip
        partial = told.with_suffix(".partial")
        partial.write_text(json.dumps(said, ensure_ascii=False, indent=1), encoding="utf-8")
        os.replace(partial, told)  # last: with it the finding is there

    def load(self, label: str) -> Findings | None:
        """What was found before under this key; None where it was not."""
        told, numbers = self._paths(label)
        try:
            said = json.loads(told.read_text(encoding="utf-8"))
            if (said["key"], said["label"]) != (self.key, label):
                return None
            tensors = load_file(numbers)
            heads = {n: Scores(tensors[f"heads/{n}"], meaning) for n, meaning in said["heads"].items()}
            arrays = {name: tensors[f"arrays/{name}"] for name in said["arrays"]}
            tables = [Table(t, tuple(c), [tuple(row) for row in rows]) for t, c, rows in said["tables"]]
            return Findings(heads, arrays, tables, said["says"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            return None


def key_of(subject: Subject, name: str, **more: Any) -> str:
    """What decides over findings: the model by name and weights, the text, the prompts, the seed."""
    digest = hashlib.sha256()
    for weight in subject.model.parameters():
        digest.update(str(tuple(weight.shape)).encode())
        digest.update(_bytes(weight.detach().flatten()[:16].float()))
    for given in (subject.input_ids, subject.attention_mask, subject.pixel_values, subject.labels):
        digest.update(b"-" if given is None else _bytes(given))
    if subject.prompts is not None:
        for given in (subject.prompts.clean, subject.prompts.corrupted, subject.prompts.answers):
            digest.update(_bytes(given))
    digest.update(json.dumps([name, subject.seed, more], sort_keys=True, default=str).encode())
    return digest.hexdigest()[:32]


def _bytes(x: Tensor) -> bytes:
    x = x.detach().cpu().contiguous()
    return (x if x.dtype != torch.bfloat16 else x.float()).numpy().tobytes()
