"""Models by name: converted once, and again when the conversion is damaged."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models

import tiny_models
from attlas.errors import UserError
from attlas.models import load as module
from attlas.models.fetch.catalogue import MODELS
from attlas.models.load import load, load_tokenizer
from real_models import fetched


@pytest.fixture
def conversions(tmp_path, monkeypatch):
    """SmolLM2's conversion with a small model in place of the packaged file; counts conversions."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_installed", lambda model: [Path(__file__)])
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
        with pytest.raises(UserError, match="the disk is full"):
            load("smollm2")
    assert list(module.cache_folder().iterdir()) == []
    load("smollm2")


def test_an_unwritable_cache(conversions, tmp_path):
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        load("smollm2")


def test_a_damaged_model_that_was_fetched_names_the_command(conversions, monkeypatch):
    load("smollm2")
    folder().rename(MODELS["smollm2"].folder())
    monkeypatch.setattr(module, "_installed", lambda model: None)
    load("smollm2")
    weights = folder() / "model.safetensors"
    weights.write_bytes(b"\xff" * weights.stat().st_size)
    for _ in range(2):
        with pytest.raises(
            UserError, match="smollm2 is only half here; run `attlas fetch smollm2`"
        ):
            load("smollm2")


def test_packages_that_are_installed_are_used(tmp_path, monkeypatch):
    """Also where several hold a piece each, which are joined."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pieces = []
    for number, wheel in enumerate(MODELS["gemma3-270m"].wheels):
        package = tmp_path / "site" / wheel.module
        (package / "data").mkdir(parents=True)
        (package / "__init__.py").write_text("raise RuntimeError('imported')")
        if wheel.holds:
            (tmp_path / "site" / wheel.holds).write_bytes(str(number).encode())
            pieces.append(str(number))
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(module.metadata, "version", lambda package: "1")
    with pytest.raises(UserError, match=r"gemma-3-270m-q4_k_m.gguf has sha256 .*not a5fd3b62"):
        load("gemma3-270m")
    joined = hashlib.sha256("".join(pieces).encode()).hexdigest()
    monkeypatch.setitem(MODELS, "gemma3-270m", replace(MODELS["gemma3-270m"], sha256=joined))
    given = []

    def finish(model, source, folder):
        given.append(source.read_text())
        tiny_models.decoder("llama").save_pretrained(folder)

    monkeypatch.setattr(module, "finish", finish)
    load("gemma3-270m")
    assert given == ["1234"]


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
    model, tokenizer = fetched("minilm")
    with torch.no_grad():
        assert model(**tokenizer("a lighthouse", return_tensors="pt"))[0].shape[-1] == 384


def test_vit():
    try:
        model = load("vit")
    except UserError as error:
        pytest.skip(str(error))
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 224, 224))[0].shape == (1, 257, 384)


def test_gemma(gemma3_270m):
    """It goes on in English, opens texts with <bos>, and is surprised by English far below chance."""
    model, tokenizer = gemma3_270m
    text = (
        "The lighthouse stood at the end of a long stone pier. Every evening, the keeper climbed "
        "the narrow stairs and lit the lamp, so that the ships could find their way home."
    )
    inputs = tokenizer(text, return_tensors="pt")
    assert inputs["input_ids"][0, 0] == tokenizer.bos_token_id == 2
    with torch.no_grad():
        loss = model(**inputs, labels=inputs["input_ids"]).loss
    assert loss.exp() < 40  # chance is 262144
    inputs = tokenizer("Once upon a time, there was a little", return_tensors="pt")
    said = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(said[0]).endswith(" girl named")
    assert model.config.layer_types[5] == "full_attention"
