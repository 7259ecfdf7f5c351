"""Transformers' own tests, of the installed version, from its source distribution into the user's cache.

    python tests/hf_suite/fetch.py         prints the folder that holds the package `tests`

pip brings the distribution from whatever index it is configured with. It holds the common and the
training mixin; the generation mixin, which it leaves out, is taken from a checkout of Transformers
where HF_CHECKOUT names one (see docs/transformers.md).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib import metadata
from pathlib import Path

from platformdirs import user_cache_dir

#: What the mixins import of a checkout, beside the modules of the distribution.
FROM_CHECKOUT = ("generation/__init__.py", "generation/test_utils.py")


def folder() -> Path:
    """Where the tests of the installed version are kept; its `tests` is the package."""
    version = metadata.version("transformers")
    return Path(user_cache_dir("attlas", appauthor=False)) / f"transformers-tests-{version}"


def fetch() -> Path:
    """The folder, filled if it is not yet.

    Raises:
        RuntimeError: pip does not bring the distribution, or it holds no tests.
    """
    here = folder()
    if not (here / "tests" / "test_modeling_common.py").exists():
        here.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=here.parent) as work:
            made = unpacked(download(Path(work)), Path(work) / "made")
            shutil.rmtree(here, ignore_errors=True)
            made.rename(here)
    checkout = os.environ.get("HF_CHECKOUT")
    for name in FROM_CHECKOUT if checkout else ():
        source, target = Path(str(checkout)) / "tests" / name, here / "tests" / name
        if not source.exists():
            raise RuntimeError(f"HF_CHECKOUT={checkout} holds no tests/{name}")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return here


def download(into: Path) -> Path:
    """The source distribution of the installed version."""
    wanted = f"transformers=={metadata.version('transformers')}"
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
        "--no-binary", "transformers", "--dest", str(into), wanted,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(into.glob("transformers-*.tar.gz"))
    if done.returncode or not found:
        said = (done.stderr or done.stdout).strip().splitlines()
        reason = said[-1] if said else "nothing said"
        raise RuntimeError(f"pip brings no source distribution of {wanted}: {reason}")
    return found[0]


def unpacked(archive: Path, into: Path) -> Path:
    """`into`, with the distribution's test modules and its licence."""
    (into / "tests").mkdir(parents=True)
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            parts = Path(member.name).parts[1:]
            kept = len(parts) == 2 and parts[0] == "tests" and parts[1].endswith(".py")
            data = tar.extractfile(member) if kept or parts == ("LICENSE",) else None
            if data is not None:
                (into / Path(*parts)).write_bytes(data.read())
    if not (into / "tests" / "test_modeling_common.py").exists():
        raise RuntimeError(f"{archive.name} holds no tests/test_modeling_common.py")
    (into / "tests" / "__init__.py").touch()
    return into


if __name__ == "__main__":
    print(fetch())
