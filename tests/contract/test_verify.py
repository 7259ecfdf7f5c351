"""`attlas verify` from the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from attlas.cli import app, main

PAPERS = Path(__file__).parents[1] / "papers"


def _verify(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["verify", *arguments])
    return result.exit_code, result.stdout


@pytest.fixture
def cases(tmp_path: Path) -> Path:
    for name in ("memory-efficient", "bigbird-block-sparse"):
        (folder,) = PAPERS.glob(f"*/golden/{name}")
        shutil.copytree(folder, tmp_path / name)
    return tmp_path


@pytest.fixture
def untyped() -> Iterator[None]:
    """FlexAttention traces the mask, and shapes checked at run time are nothing it can trace."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("untyped")
def test_table_says_machine_routes_and_count(cases: Path) -> None:
    code, told = _verify("bigbird-mask", "--cases", str(cases))
    assert code == 0
    for word in ("machine", "versions", "torch", "reference on cpu: runs", "sdpa on cpu: runs",
                 "flex on cpu: runs", "chunked on cpu: runs", "8 checks: 8 passed"):  # fmt: skip
        assert word in told
    assert "memory" not in told.split("chunked on cpu")[1]


def test_json_is_one_object_a_line(cases: Path) -> None:
    code, told = _verify("bigbird-mask", "memory-efficient", "--json", "--cases", str(cases))
    lines = [json.loads(line) for line in told.splitlines()]
    assert code == 0
    assert {tuple(line) for line in lines} == {
        ("name", "case", "check", "error", "bound", "status", "reason")
    }
    assert {"bigbird-block-sparse/a", "memory-efficient/a"} <= {line["case"] for line in lines}
    assert {line["status"] for line in lines} == {"passed"}


def test_cases_under_other_names_and_folders(cases: Path) -> None:
    for suffix in ("json", "safetensors"):
        path = cases / "memory-efficient" / f"a.{suffix}"
        path.rename(path.with_name(f"long-keys.{suffix}"))
    code, told = _verify("memory-efficient", "--json", "--cases", str(cases))
    assert code == 0
    assert json.loads(told.splitlines()[-1])["case"] == "memory-efficient/long-keys"


def test_a_miss_is_exit_code_1(cases: Path) -> None:
    path = cases / "memory-efficient" / "a.safetensors"
    tensors = load_file(path)
    tensors["out.o"][0, 0, 0, 0] += 1
    save_file(tensors, path)
    code, told = _verify("memory-efficient", "--cases", str(cases))
    assert code == 1
    assert "off by 1" in told
    code, told = _verify("memory-efficient", "--json", "--cases", str(cases))
    assert code == 1
    last = json.loads(told.splitlines()[-1])
    assert last["error"] == pytest.approx(1.0)
    assert last["error"] > last["bound"]
    assert last["status"] == "failed"


def test_a_case_without_adapter_is_no_miss(tmp_path: Path) -> None:
    folder = tmp_path / "not-known"
    folder.mkdir()
    (folder / "b.json").write_text('{"config": {}}')
    save_file({"in.x": torch.ones(1)}, folder / "b.safetensors")
    code, told = _verify("not-known", "--cases", str(tmp_path))
    assert code == 0
    assert "no adapter" in told


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--cases", "/no/such/folder"], "/no/such/folder"),
        (["qk-nrom"], "did you mean 'qk-norm'"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["verify", *arguments])
    assert stopped.value.code == 2
    told = capsys.readouterr()
    assert named in told.err
    assert len(told.err.splitlines()) == 1
    assert not told.out


def test_an_empty_folder_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["verify", "--cases", str(tmp_path)])
    assert stopped.value.code == 2
    assert "holds no reference cases" in capsys.readouterr().err
