"""Parts are called whoever calls the model, and see the layers of the part that was meant."""

import pytest
import torch
import transformers as hf
from torch import nn

import attlas
import outer_models as made
from attlas.attach import Part, attach
from attlas.attach.towers import choose
from attlas.errors import UserError

FAMILIES = [
    made.llava, made.gemma3, made.qwen2_vl, made.idefics3, made.opt, made.bart_decoder,
]  # fmt: skip


def generate(model, given):
    out = model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    return out[:, -4:]


def snapkv(keep=0.5, window=4):
    return attlas.make("snapkv", keep=keep, window=window)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_generation(family, attention):
    model, given = family(attention)
    batch, tokens = given["input_ids"].shape
    expected = generate(model, given)
    with attach(model, snapkv(keep=1.0)):
        assert torch.equal(generate(model, given), expected)
    with attach(model, record=["entropy"]) as session:
        assert torch.equal(generate(model, given), expected)
    assert session["entropy"].shape == (2, batch, 4, tokens + 3)
    with attach(model) as whole:
        generate(model, given)
    with attach(model, snapkv()) as session:
        generate(model, given)
    assert session.kv_bytes < 0.8 * whole.kv_bytes


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_recorded_weights_are_those_of_eager(family):
    """The whole prompt with its picture, not the tower alone."""
    (model, given), (eager, _) = family(), family("eager")
    with torch.no_grad():
        expected = torch.stack(eager(**given, output_attentions=True).attentions)
        with attach(model, record=["weights"]) as session:
            model(**given)
    torch.testing.assert_close(session["weights"], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", [made.llava, made.gemma3], ids=lambda f: f.__name__)
def test_padding_is_told_though_the_tower_is_given_masks_or_embeddings(family):
    model, given = family()
    padded = {k: nn.functional.pad(v, (5, 0)) if v.ndim == 2 else v for k, v in given.items()}
    found = []
    for each in (given, padded):
        with attach(model, snapkv()) as session:
            found.append(generate(model, each))
    assert torch.equal(*found)
    assert session.cache.get_seq_length() == padded["input_ids"].shape[1] + 3


def test_ids_of_the_prompt_reach_parts():
    class Ids(Part):
        def begin(self, forward_pass):
            self.ids = forward_pass.ids

    model, given = made.llava()
    part = Ids()
    with torch.no_grad(), attach(model, part):
        model(**given)
    assert torch.equal(part.ids, given["input_ids"])


def test_a_mask_of_four_dimensions_is_refused_around_the_tower_too():
    model, given = made.llava()
    tokens = given["input_ids"].shape[1]
    given["attention_mask"] = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril()
    with pytest.raises(UserError, match="2-D"), torch.no_grad(), attach(model, snapkv()):
        model(**given)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks Transformers by a former name
@pytest.mark.parametrize("kind", ["LoRA", "IA3", "prompt"])
def test_peft(kind):
    peft = pytest.importorskip("peft")
    config = {
        "LoRA": lambda: peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        "IA3": lambda: peft.IA3Config(
            target_modules=["k_proj", "v_proj"], feedforward_modules=[], task_type="CAUSAL_LM"
        ),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    }[kind]()  # fmt: skip
    model, given = peft.get_peft_model(made.llama(), config).eval(), made.prompt(batch=2)
    expected = generate(model, given)
    with attach(model, snapkv(keep=1.0)):
        assert torch.equal(generate(model, given), expected)
    with torch.no_grad(), attach(model, snapkv(), record=["entropy"]) as session:
        model(**given, use_cache=True)
    virtual = 4 if kind == "prompt" else 0
    assert session["entropy"].shape == (2, 2, 4, virtual + given["input_ids"].shape[1])
    assert 0 < session.kv_bytes < 0.8 * session.cache.get_seq_length() * 2 * 2 * 2 * 2 * 8 * 4


def test_other_wrappers():
    class Around(nn.Module):
        def __init__(self, *models):
            super().__init__()
            self.models = nn.ModuleList(models)

        def forward(self, **given):
            return self.models[0](**given)

    model, given = made.llama(), made.prompt()
    for wrapped in (Around(model), nn.DataParallel(Around(model))):
        with torch.no_grad(), attach(wrapped, record=["entropy"]) as session:
            wrapped(**given)
        assert session["entropy"].shape == (2, 1, 4, 14)
    with pytest.raises(UserError, match=r"several models \(models.0: LlamaForCausalLM, models.1"):
        attach(Around(model, made.llama()))


SIDES = [
    (made.bart, lambda m: m.model.encoder, lambda m: m.model.decoder, 2),
    (made.t5, lambda m: m.encoder, lambda m: m.decoder, 4),
]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "encoder", "decoder", "heads"), SIDES, ids=["bart", "t5"])
def test_one_side_of_an_encoder_decoder(family, encoder, decoder, heads, attention):
    """Each side alone, while the whole model is called; attention across is none of its layers."""
    model, given = family(attention), made.prompt(batch=2)
    call = given | {"decoder_input_ids": given["input_ids"][:, :9]}
    expected = generate(model, given)
    with (
        pytest.raises(UserError, match=r"encoder-decoder.*decoder"),
        attach(model, record=["entropy"]),
    ):
        pass
    with torch.no_grad():
        eager = family("eager")(**call, output_attentions=True)
        for side, rows, weights in (
            (encoder, (2, 2, heads, 14), eager.encoder_attentions),
            (decoder, (2, 2, 4, 9), eager.decoder_attentions),
        ):
            with attach(side(model), record=["entropy", "weights"]) as session:
                model(**call)
            assert session["entropy"].shape == rows
            torch.testing.assert_close(
                session["weights"], torch.stack(weights), atol=1e-5, rtol=1e-4
            )
            with attach(side(model), record=["entropy"]):
                assert torch.equal(generate(model, given), expected)
    with attach(decoder(model), snapkv(keep=1.0, window=1)):
        assert torch.equal(generate(model, given), expected)
    with torch.no_grad(), attach(decoder(model), snapkv(window=2)) as session:
        model(**call)
        held = session.kv_bytes
    with torch.no_grad(), attach(decoder(model)) as session:
        model(**call)
    assert held < 0.8 * session.kv_bytes


def test_two_towers():
    model, pictures = made.clip(), made.pixels(2, 3, 16, 16)
    given = {"input_ids": made.prompt(batch=2)["input_ids"], "pixel_values": pictures}
    with pytest.raises(UserError, match=r"text_model: CLIP.*vision_model: CLIP"):
        attach(model, record=["entropy"])
    with torch.no_grad():
        expected = model(**given).logits_per_text
        with attach(model):
            assert torch.equal(model(**given).logits_per_text, expected)
        with (
            attach(model.text_model, record=["entropy"]) as text,
            attach(model.vision_model, record=["entropy"]) as vision,
        ):
            assert torch.equal(model(**given).logits_per_text, expected)
    assert text["entropy"].shape == (2, 2, 4, 14)
    assert vision["entropy"].shape == (3, 2, 2, 17)


def test_blocks_that_are_used_several_times():
    ids = made.prompt(batch=2)["input_ids"]
    with torch.no_grad():
        expected = made.albert("eager")(ids, output_attentions=True).attentions
        model, last = made.albert(), attlas.make("weights", layers=[-1])
        with attach(model, last, record=["weights", "entropy"]) as session:
            model(ids)
            model(ids)
        zamba = made.zamba2()
        with attach(zamba, record=["entropy"]) as told:
            zamba(ids)
    torch.testing.assert_close(session["weights"], torch.stack(expected), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(last.result(), expected[-1][None], atol=1e-5, rtol=1e-4)
    assert session["entropy"].shape == (6, 2, 4, 14)
    assert told["entropy"].shape == (2, 2, 4, 14)
    assert told.attended == {2, 5}


@pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated:FutureWarning")  # by 5.17 itself
def test_layers_that_attend_to_pictures_alone():
    model, given = made.mllama()
    expected = generate(model, given)
    with attach(model, snapkv(keep=1.0), record=["entropy"]) as session:
        assert torch.equal(generate(model, given), expected)
    assert session.attended == {0, 2}
    assert session["entropy"].shape == (2, 1, 4, given["input_ids"].shape[1] + 3)


def test_attention_in_several_pieces_is_refused():
    """A vision tower that cuts two pictures apart inside of one layer."""
    model, given = made.qwen2_vl()
    grid = given["image_grid_thw"]
    with torch.no_grad(), attach(model.model.visual, record=["entropy"]) as session:
        model.model.visual(given["pixel_values"], grid_thw=grid)
        assert session["entropy"].shape == (3, 1, 2, 16)
        two = given["pixel_values"].repeat(2, 1), grid.repeat(2, 1)
        with pytest.raises(UserError, match=r"several pieces \(layer 0\)"):
            model.model.visual(two[0], grid_thw=two[1])


def test_vision_towers_run_as_they_are():
    model, given = made.llava("eager")
    tower = choose(model, (snapkv(),))
    assert tower.module is model.model.language_model
    with torch.no_grad():
        expected = model(**given).logits
        with attach(model, record=["entropy"]) as session:
            assert model.config.vision_config._attn_implementation == "eager"
            torch.testing.assert_close(model(**given).logits, expected, atol=1e-5, rtol=1e-4)
    assert session["entropy"].shape[0] == 2
    assert model.config.text_config._attn_implementation == "eager"


def test_nothing_recorded():
    model, ids = made.llama(), made.prompt()["input_ids"]
    with (
        attach(model, record=["entropy"]) as session,
        pytest.raises(UserError, match="not been called"),
    ):
        session["entropy"]
    mamba = hf.MambaForCausalLM(hf.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1))
    with pytest.raises(UserError, match="no attention"):
        attach(mamba, record=["entropy"])
    with (
        torch.no_grad(),
        attach(made.zamba2(), record=[attlas.make("entropy", layers=[0])]) as session,
    ):
        session.model(ids)
    with pytest.raises(UserError, match=r"none has attended.*\[2, 5\]"):
        session["entropy"]
