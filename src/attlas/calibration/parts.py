"""What a part that needs calibration has, and what gathers its statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from attlas.attach.part import Part
from attlas.calibration.statistics import Calibration, default_path
from attlas.errors import UserError
from attlas.options import option


class Calibrator(Part):
    """Gathers statistics while texts are read.

    All that it knows stands in `sums`, so that a calibration can be interrupted and resumed.

    Attributes:
        sums: running sums, named by layer: "3.squares".
    """

    def setup(self) -> None:
        """Nothing has been read yet."""
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Add to the running sum `name`."""
        known = self.sums.get(name)
        self.sums[name] = value if known is None else known + value.to(known.device)

    def tensors(self) -> dict[str, Tensor]:
        """The finished statistics.

        Raises:
            ValueError: too little was read.
        """
        raise NotImplementedError


class Calibrated(Part):
    """Mixin of parts that need statistics of the model: `class QFilters(Calibrated, CachePolicy)`."""

    calibration: str | Path | Calibration | None = option(
        "statistics of this model, or the file that holds them; the one that `attlas calibrate` left in "
        "the user's cache folder unless given", default=None,
    )  # fmt: skip

    def setup(self) -> None:
        """The statistics are found when the part is attached."""
        super().setup()
        self.found: Calibration | None = None

    @property
    def calibration_key(self) -> str:
        """The part's registered name; with what of its options the statistics rest on, if they do."""
        from attlas.catalog import registry

        entry = registry.entry_of(type(self))
        return type(self).__name__ if entry is None else entry.name

    def calibrator(self) -> Calibrator:
        """What gathers the statistics that these options need."""
        raise NotImplementedError

    @property
    def statistics(self) -> dict[str, Tensor]:
        """The statistics of the model that the part is attached to.

        Raises:
            RuntimeError: it is attached to none yet.
        """
        if self.found is None:
            raise RuntimeError(f"{type(self).__name__} knows its statistics once it is attached")
        return self.found.tensors

    def check(self, model: nn.Module) -> None:
        """Find the statistics, and refuse those of another model.

        Raises:
            ValueError: there are none, with the command that makes them; or they are of another
                model or part.
        """
        key = self.calibration_key
        if isinstance(self.calibration, Calibration):
            found, where = self.calibration, "this calibration"
        else:
            path = self.calibration or default_path(key, model)
            if self.calibration is None and not Path(path).exists():
                name = key.split(",")[0]
                raise UserError(
                    f"{type(self).__name__} needs statistics of this model; make them with "
                    f"`attlas calibrate {name}` or attlas.calibration.calibrate(model, part, ...)"
                )
            found, where = Calibration.load(path), f"the file {path}"
        found.check(key, model, where)
        device: Any = next(model.parameters()).device
        tensors = {name: t.to(device) for name, t in found.tensors.items()}
        self.found = Calibration(found.key, found.model, tensors, found.about)
        super().check(model)
