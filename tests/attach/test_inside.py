"""What happens to a model inside the block: checkpoints, compilers, threads, copies."""

import copy
import io
import sys
import threading

import pytest
import torch
import transformers as hf
from torch.utils.checkpoint import checkpoint

import attlas
import outer_models as made
from attlas.attach import Part, Recorder, attach
from attlas.errors import UserError
from attlas.hf.caches import cache_of, with_cache

IDS = made.prompt(batch=2)["input_ids"]
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*checkpointing.*deprecated:FutureWarning"
)  # since 5.24


class Bias(Part):
    """Every third column gains."""

    def score_mod(self, call):
        return lambda s, b, h, q, k: s + 0.3 * (k % 3 == 0)


class Louder(Part):
    points = ("residual", "attention", "mlp")

    def stream(self, site, x):
        return x * 1.1


class Halved(Part):
    def normalize(self, call, weights, queries, keys):
        return weights * (1 - 0.5 * (keys == 3).to(weights.dtype))


def ours():
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    return attlas.Decoder(attlas.DecoderConfig(**sizes, num_attention_heads=4)).eval()


def gpt2():
    config = hf.GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0, resid_pdrop=0,
        embd_pdrop=0,
    )  # fmt: skip
    return made.build(hf.GPT2LMHeadModel, config)


def snapkv():
    return attlas.make("snapkv", keep=0.5, window=4)


def trained(model, part):
    """Gradients of two calls together, and what was recorded."""
    model.train()
    model.zero_grad()
    with attach(model, part, record=["entropy"]) as session:
        short = IDS[:, 3:].contiguous()
        loss = 2 * model(short, labels=short).loss + model(IDS, labels=IDS).loss
        loss.backward()
        found = session["entropy"].detach()
    return [p.grad.clone() for p in model.parameters()], found


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("part", [Bias, Louder, Halved])
@pytest.mark.parametrize("family", [made.llama, gpt2, ours], ids=lambda f: f.__name__)
def test_checkpointing_changes_nothing(family, part, reentrant):
    model = family()
    expected, rows = trained(model, part())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    functions = [m.__dict__.get("_gradient_checkpointing_func") for m in model.modules()]
    found, again = trained(model, part())
    assert torch.equal(rows, again)
    for one, two in zip(expected, found, strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4)
    assert functions == [m.__dict__.get("_gradient_checkpointing_func") for m in model.modules()]


def test_checkpointing_that_cannot_be_honoured():
    class Gradients(Recorder):
        wants_gradients = True

        def update(self, call, weights, queries, keys):
            pass

    model = made.llama().train()
    model.gradient_checkpointing_enable()
    for part in (snapkv(), Gradients()):
        with pytest.raises(UserError, match="gradient checkpointing"), attach(model, part):
            model(IDS, labels=IDS)
    with attach(model.eval(), snapkv()) as session:
        model(IDS, use_cache=True)
    assert session.kv_bytes
    model.train()
    with attach(model, Bias()):
        loss = model(IDS, labels=IDS).loss
    with pytest.raises(UserError, match="inside the with block"):
        loss.backward()
    model.gradient_checkpointing_disable()
    layer, plain = model.model.layers[0], model.model.layers[0].forward
    layer.forward = lambda h, **k: checkpoint(lambda x: plain(x, **k), h, use_reentrant=False)
    with pytest.raises(UserError, match="checkpointing"), attach(model, Bias()):
        model(IDS, labels=IDS).loss.backward()


def test_compiled_models_run_as_they_are():
    """Whole and layer by layer, compiled before and while attached."""
    model = made.llama(num_hidden_layers=1)
    if torch.__version__ < "2.12":
        with pytest.raises(UserError, match=r"compiled model with PyTorch .* take 2\.12"):
            attach(torch.compile(model, backend="eager"), Bias())
        return
    with torch.no_grad():
        plain = model(IDS).logits
        with attach(model, Bias(), record=["entropy"]) as session:
            expected = model(IDS).logits
        layers = made.llama(num_hidden_layers=1)
        layers.model.layers[0].compile(backend="eager")
        for compiled in (torch.compile(model, backend="eager"), layers):
            torch.testing.assert_close(compiled(IDS).logits, plain)
            with attach(compiled, Bias(), record=["entropy"]) as again:
                torch.testing.assert_close(compiled(IDS).logits, expected)
            torch.testing.assert_close(again["entropy"], session["entropy"])
            torch.testing.assert_close(compiled(IDS).logits, plain)
    with pytest.raises(UserError, match="fullgraph"):
        attach(torch.compile(model, backend="eager", fullgraph=True), Bias())
    torch.compiler.reset()


def at_once(work, count):
    """The errors of `count` threads, switched between as often as possible."""
    errors = []

    def run(number):
        try:
            work(number)
        except UserError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    return errors


@pytest.mark.parametrize("recorded", [False, True])
def test_threads(recorded):
    """Caches are apart; a record is of one sequence, and a second one at once is refused."""
    model, found = made.llama(), {}
    prompts = [IDS[:1, :length] for length in range(10, 13)]

    def ask(number):
        ids = prompts[number]
        found[number] = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False
        )

    with attach(model, snapkv(), record=["entropy"] if recorded else []):
        for number in range(3):
            ask(number)
        expected, found = found, {}
        errors = at_once(ask, 3)
        for number in range(2):
            assert not at_once(lambda _, n=number: ask(n), 1)  # one after the other
    assert all(torch.equal(found[n], expected[n]) for n in found)
    assert all("several threads" in error for error in errors)
    assert recorded or not errors


def test_a_record_follows_one_sequence():
    """A sequence that goes on behind another thread's would be recorded among that one's rows."""
    model = made.llama()
    with torch.no_grad(), attach(model, record=["entropy"]):
        cache = cache_of(model(IDS, use_cache=True))
        assert not at_once(lambda _: model(IDS, use_cache=True), 1)
        with pytest.raises(UserError, match="several threads"):
            model(IDS[:, :1], **with_cache(model, cache))


@pytest.mark.parametrize("family", [made.llama, ours], ids=lambda f: f.__name__)
def test_copies_are_plain_models(family):
    model, saved = family(), io.BytesIO()
    plain = model(IDS).logits
    with torch.no_grad(), attach(model, Bias(), Louder(), record=["entropy"]):
        changed = model(IDS).logits
        copied = copy.deepcopy(model)
        average = torch.optim.swa_utils.AveragedModel(model)
        torch.save(model, saved)
        assert torch.equal(copied(IDS).logits, plain)
        assert torch.equal(model(IDS).logits, changed)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)  # what the test itself has saved
    for other in (copied, average, loaded):
        assert torch.equal(other(IDS).logits, plain)
    with torch.no_grad(), attach(copied, Bias(), Louder()):
        assert torch.equal(copied(IDS).logits, changed)


def test_a_model_of_the_same_configuration_is_plain():
    model = made.llama()
    with torch.no_grad(), attach(model, Bias()):
        other = hf.LlamaForCausalLM(model.config).eval()
        inside = other(IDS).logits
    torch.testing.assert_close(other(IDS).logits, inside)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_an_implementation_that_is_changed_inside_is_refused(name):
    model = made.llama()
    with attach(model, snapkv()):
        model.set_attn_implementation(name)
        with pytest.raises(UserError, match=f"set to '{name}' inside"):
            model(IDS)
    assert model.config._attn_implementation == "sdpa"
    pictures, given = made.llava()
    with torch.no_grad(), attach(pictures, snapkv()) as session:
        pictures.model.vision_tower.set_attn_implementation("eager")  # which no part is about
        pictures(**given, use_cache=True)
    assert session.kv_bytes


def test_replicas_are_refused():
    """What DataParallel makes on several devices: modules with the same hooks that are not attached."""
    model = made.llama()
    with attach(model, snapkv()), pytest.raises(UserError, match="DataParallel"):
        copy.copy(model.model)(IDS)
