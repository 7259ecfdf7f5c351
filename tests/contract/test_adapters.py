"""What is wrong with an adapter its contract finds; a good one passes, and is found everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import attlas
from attlas.catalog import registry
from attlas.catalog.table import markdown
from attlas.cli import main
from attlas.contract.parts import prompt, small_llama
from attlas.errors import UserError
from attlas.kinds.adapter import Adapter
from attlas.options import option
from tiny_folder import save


class LowRank(nn.Module):
    """A projection and a low-rank difference, which starts at 0."""

    def __init__(self, old: nn.Linear, rank: int) -> None:
        super().__init__()
        self.old = old
        self.a = nn.Parameter(torch.randn(rank, old.in_features).to(old.weight) / 4)
        self.b = nn.Parameter(torch.zeros(old.out_features, rank).to(old.weight))

    def forward(self, x):
        return self.old(x) + x @ self.a.T @ self.b.T


class ToyLowRank(Adapter):
    """Toy: low-rank differences of the projections that leave the MLPs."""

    rank: int = option("of the differences", default=2, at_least=1, kw_only=False)

    def check(self, model) -> None:
        if not hasattr(model.base_model, "layers") or not hasattr(
            model.base_model.layers[0].mlp, "down_proj"
        ):
            raise UserError(f"takes models with down_proj, got {model.config.model_type}")

    def change(self, injection) -> None:
        for name, module in list(injection.model.named_modules()):
            if name.endswith("down_proj"):
                injection.replace(name, LowRank(module, self.rank))

    def trainable(self):
        return {
            f"{path}.{name}": getattr(new, name)
            for path, (_, new) in self.injection.replaced.items() for name in ("a", "b")
        }  # fmt: skip

    def folded(self):
        return {
            f"{path}.weight": old.weight + new.b @ new.a
            for path, (old, new) in self.injection.replaced.items()
        }


class ToyWhole(Adapter):
    """Toy: trains the model's own last norm, and starts where the model is."""

    def change(self, injection) -> None:
        self.weights = [
            p for n, p in injection.model.named_parameters() if n.endswith("norm.weight")
        ]

    def trainable(self):
        return {"norm": self.weights[-1]}

    def folded(self):
        return {
            name: p for name, p in self.injection.model.named_parameters()
            if p is self.trainable()["norm"]
        }  # fmt: skip


class StartsElsewhere(ToyLowRank):
    """Its second factor does not start at 0."""

    def change(self, injection) -> None:
        super().change(injection)
        for _, new in injection.replaced.values():
            nn.init.normal_(new.b)


class LeavesAHook(ToyLowRank):
    """A hook that it does not tell of."""

    def change(self, injection) -> None:
        super().change(injection)
        injection.model.register_forward_hook(lambda *_: None)


class ReplacesBehindTheBack(ToyLowRank):
    """A module that undoing does not know."""

    def change(self, injection) -> None:
        super().change(injection)
        body = injection.model.base_model
        body.layers[0].mlp.up_proj = LowRank(body.layers[0].mlp.up_proj, 1)


class ChangesAWeight(ToyLowRank):
    """Its loss changes a weight that it does not train."""

    def loss(self, model, ids, progress):
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(1.01)
        return super().loss(model, ids, progress)


class MergesWrongly(ToyLowRank):
    """Forgets half of the difference."""

    def folded(self):
        old = {f"{path}.weight": old.weight for path, (old, _) in self.injection.replaced.items()}
        return {n: old[n] + (w - old[n]) / 2 for n, w in super().folded().items()}


class SavesTheModel(ToyLowRank):
    """Saves all weights."""

    def difference(self):
        return {**super().difference(), **dict(self.injection.model.named_parameters())}


class SavesZeros(ToyLowRank):
    """What it saves is not what it trained."""

    def difference(self):
        return {n: t * 0 for n, t in super().difference().items()}


class ForgetsTheCache(ToyLowRank):
    """Adds the mean of the tokens at hand, which a cache cannot tell."""

    class Mean(nn.Module):
        def __init__(self, old) -> None:
            super().__init__()
            self.old = old

        def forward(self, x):
            return self.old(x) + x.mean(1, keepdim=True)

    nothing: ClassVar = {"rank": 0}

    def change(self, injection) -> None:
        super().change(injection)
        if self.rank:
            for layer in range(2):
                path = f"model.layers.{layer}.input_layernorm"
                injection.replace(path, self.Mean(injection.model.get_submodule(path)))

    def trainable(self):
        return super().trainable() if self.rank else {}

    def folded(self):
        raise UserError(f"{self.name} cannot be merged")


class TrainsOutside(ToyLowRank):
    """Trains a parameter that is not in the model."""

    def trainable(self):
        self.outside = getattr(self, "outside", nn.Parameter(torch.zeros(3)))
        return {**super().trainable(), "outside": self.outside}


class ForgetsAnOption(ToyLowRank):
    """Its option is not what it was given."""

    def __init__(self, rank: int = 2) -> None:
        self.rank = rank + 1


class SharesWithItsCopy(ToyLowRank):
    """A hook that is no bound method, so that copies share it."""

    def change(self, injection) -> None:
        super().change(injection)
        scale = next(iter(injection.replaced.values()))[1].b

        def hook(module, args, output):
            return output + scale.sum()

        injection.hook(injection.model.base_model.norm.register_forward_hook(hook))

    def folded(self):
        raise UserError(f"{self.name} cannot be merged")


BROKEN = {
    StartsElsewhere: "identity-at-the-start", LeavesAHook: "undone",
    ReplacesBehindTheBack: "undone", ChangesAWeight: "base-untouched", MergesWrongly: "merged",
    SavesTheModel: "saved", SavesZeros: "saved", ForgetsTheCache: "decoding",
    TrainsOutside: "base-untouched", ForgetsAnOption: "saved", SharesWithItsCopy: "copied",
}  # fmt: skip


@pytest.fixture
def registered(request):
    attlas.mechanism("toy-adapter", paper="", example={"rank": 2})(request.param)
    yield request.param
    registry.unregister("toy-adapter")


@pytest.mark.parametrize("registered", [ToyLowRank], indirect=True)
def test_a_good_adapter_passes(registered):
    assert {r.status for r in attlas.check(registered)} == {"passed"}


def test_one_that_trains_the_model_itself_passes():
    attlas.mechanism("toy-whole", paper="")(ToyWhole)
    try:
        assert {r.status for r in attlas.check(ToyWhole)} == {"passed"}
    finally:
        registry.unregister("toy-whole")


@pytest.mark.parametrize("registered", BROKEN, indirect=True, ids=lambda toy: toy.__name__)
def test_a_broken_adapter_fails_the_check_for_it(registered):
    failed = {r.check for r in attlas.check(registered, raises=False) if r.status == "failed"}
    assert BROKEN[registered] in failed, failed


def test_adapters_compose_and_leave_in_turn(tmp_path):
    model, ids = small_llama(), prompt(24, 2)
    with torch.no_grad():
        plain = model(ids).logits
        first, second = attlas.make("gate-norm", layers=2), ToyLowRank()
        undo = first.inject(model)
        alone = model(ids).logits
        with second.inject(model):
            for parameter in second.trainable().values():
                parameter.normal_()
            assert not torch.equal(model(ids).logits, alone)
            with pytest.raises(ValueError, match="undo that first"):
                undo()
            with pytest.raises(ValueError, match="gate-norm and ToyLowRank"):
                model.save_pretrained(tmp_path)
        assert torch.equal(model(ids).logits, alone)
        undo()
        assert torch.equal(model(ids).logits, plain)


def test_two_that_replace_the_same_are_refused_and_nothing_is_changed():
    class Other(Adapter):
        """Replaces what stands around a projection."""

        def change(self, injection) -> None:
            injection.replace("model.norm", nn.Identity())
            injection.replace("model.layers.1.mlp", nn.Identity())

    model, ids = small_llama(), prompt(24, 2)
    with torch.no_grad(), ToyLowRank().inject(model):
        before = model(ids).logits
        with pytest.raises(
            ValueError, match=r"Other does not go together with ToyLowRank.*down_proj"
        ):
            Other().inject(model)
        assert torch.equal(model(ids).logits, before)
        assert isinstance(model.model.layers[1].mlp.down_proj, LowRank)


def test_undone_where_the_model_went_meanwhile():
    model, ids = small_llama(torch.float32), prompt(8)
    with torch.no_grad():
        wanted = small_llama(torch.float32).double()(ids).logits
        with attlas.make("gate-norm", layers=1).inject(model):
            model.double()
        torch.testing.assert_close(model(ids).logits, wanted)


def test_models_of_peft_attached_ones_and_what_is_no_model_are_refused():
    layer = type("Linear", (nn.Linear,), {"__module__": "peft.tuners.lora.layer"})
    model = small_llama()
    adapter = attlas.make("gate-norm", layers=1)
    with (
        attlas.attach(model, attlas.make("streaming-llm", keep=0.5)),
        pytest.raises(ValueError, match="attach"),
    ):
        adapter.inject(model)
    model.model.layers[0].self_attn.q_proj = layer(32, 32, bias=False)
    with pytest.raises(ValueError, match="PEFT"):
        adapter.inject(model)
    with pytest.raises(TypeError, match="Transformers model"):
        adapter.inject(nn.Linear(2, 2))


def test_what_was_merged_stays():
    model = small_llama()
    undo = attlas.make("gate-norm", layers=1).inject(model)
    undo.adapter.merge()
    with pytest.raises(ValueError, match="for good"):
        undo()


# A toy is found by list, show, docs table, contract and runner without being named anywhere ---------


def cli(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return ended.value.code or 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("model"))


SMALL = ("--length", "32", "--batch", "2", "--tested", "64", "--device", "cpu")


@pytest.mark.parametrize("registered", [ToyLowRank], indirect=True)
def test_a_toy_is_found_without_being_named_anywhere(registered, folder, tmp_path, capsys):
    assert cli("list", "--json", "--kind", "adapter", "--search", "toy-adapter") == 0
    assert json.loads(capsys.readouterr().out)["names"] == ["toy-adapter"]
    assert cli("show", "toy-adapter") == 0
    assert "attlas adapt MODEL --with toy-adapter" in capsys.readouterr().out
    assert "`toy-adapter`" in markdown()
    given = (str(folder), "--with", "toy-adapter(rank=1)", "--out", str(tmp_path), *SMALL)
    assert cli("adapt", *given, "--steps", "3", "--merge") == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["settings"]["options"] == {"rank": 1}
    assert len(result["losses"]) == 3
    assert result["after"]["perplexity"] != result["before"]["perplexity"]
    ids, merged = prompt(12), AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    Adapter.load(tmp_path / "adapter.safetensors", loaded)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, loaded(ids).logits)
