"""Finished statistics of one model for one part, and the files that hold them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from attlas.errors import UserError
from attlas.storage.files import fingerprint

FORMAT = "attlas-calibration-1"


@dataclass(frozen=True)
class Calibration:
    """Statistics of a model.

    Attributes:
        key: the part that they are for, and what of its options they rest on.
        model: what tells the model from others (`attlas.storage.files.fingerprint`).
        tensors: the statistics, on the CPU.
        about: how they were gathered: tokens read, and so on.
    """

    key: str
    model: dict[str, Any]
    tensors: dict[str, Tensor]
    about: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Write to `path`, at once or not at all.

        Raises:
            ValueError: it cannot be written.
        """
        path = Path(path)
        told = {"format": FORMAT, "key": self.key, "model": self.model, "about": self.about}
        partial = path.with_name(path.name + ".writing")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            tensors = {n: t.detach().cpu().contiguous() for n, t in self.tensors.items()}
            save_file(tensors, partial, metadata={"attlas": json.dumps(told)})
            partial.replace(path)
        except OSError as error:
            raise UserError(f"cannot write statistics to {path}: {error.strerror}") from error
        return path

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` wrote.

        Raises:
            ValueError: no such file, a damaged one, or one that holds something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                told = json.loads((file.metadata() or {}).get("attlas", "null"))
                if not isinstance(told, dict) or told.get("format") != FORMAT:
                    raise UserError(f"{path} holds no calibration made by attlas")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls(told["key"], told["model"], tensors, told["about"])
        except FileNotFoundError:
            raise UserError(f"there is no calibration at {path}") from None
        except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
            raise UserError(f"the calibration at {path} is damaged: {error}") from error

    def check(self, key: str, model: nn.Module, where: str) -> None:
        """Refuse to serve another part or another model.

        Raises:
            ValueError: naming what was calibrated and what is asked for.
        """
        if self.key != key:
            raise UserError(f"{where} was calibrated for {self.key}, not for {key}")
        wanted = fingerprint(model)
        for what in wanted:
            if self.model.get(what) != wanted[what]:
                raise UserError(
                    f"{where} was calibrated on another model: its {what} is "
                    f"{self.model.get(what)}, this model's is {wanted[what]}"
                )


def default_path(key: str, model: nn.Module) -> Path:
    """Where the statistics of a model for a part are kept: in the user's cache folder."""
    from attlas.models.load import cache_folder

    known = fingerprint(model)
    return (
        cache_folder()
        / "calibration"
        / f"{known['kind']}-{known['weights']}"
        / f"{key}.safetensors"
    )
