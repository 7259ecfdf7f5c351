"""What is asked of our models beside logits, as every Transformers model takes it, or refused by name."""

import copy

import pytest
import torch
import transformers as hf

import attlas
from attlas.catalog import registry
from attlas.catalog.kinds import LAYER
from attlas.hf.caches import DynamicCache, cache_of, with_cache
from attlas.models.encoder import EncoderForMaskedLM, EncoderForSequenceClassification

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.arange(3, 21).reshape(2, 9)
MASK = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])


def made(kind, config, **options):
    torch.manual_seed(0)
    return kind(config(**{**SIZES, "initializer_range": 0.3, **options})).eval()


def decoder(attention="softmax", **options):
    return made(attlas.Decoder, attlas.DecoderConfig, attention=attention, **options)


def seq2seq(**options):
    return made(attlas.Seq2Seq, attlas.Seq2SeqConfig, **options)


def classifier(**options):
    return made(EncoderForSequenceClassification, attlas.EncoderConfig, **options)


# Maps ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["softmax", "dint-transformer", "gated-linear-attention"])
def test_maps_are_those_of_the_layers_and_outputs_stay(attention):
    model = decoder(attention)
    model.config.output_attentions = True  # as the configuration says
    out = model(IDS, attention_mask=MASK, output_hidden_states=True)
    model.config.output_attentions = False
    torch.testing.assert_close(out.logits, model(IDS, attention_mask=MASK).logits)
    for block, h, weights in zip(model.model.layers, out.hidden_states, out.attentions, strict=False):
        want = block.attention.weights(block.attention_norm(h), mask=MASK.bool())
        torch.testing.assert_close(weights, want)


@pytest.mark.parametrize("attention", ["softmax", "differential-transformer", "alibi"])
def test_maps_of_steps_are_rows_of_the_whole(attention):
    model = decoder(attention)
    whole = model(IDS, output_attentions=True).attentions
    cache = cache_of(model(IDS[:, :7]))
    step = model(IDS[:, 7:], output_attentions=True, **with_cache(model, cache))
    for one, row in zip(whole, step.attentions, strict=True):
        torch.testing.assert_close(row, one[:, :, 7:])


@pytest.mark.parametrize("attention", ["lightning-attention-2", "castle-lookahead-keys"])
def test_maps_that_a_cache_tells_no_more_are_refused(attention):
    model = decoder(attention)
    cache = cache_of(model(IDS[:, :7], output_attentions=True))
    plain = cache_of(model(IDS[:, :7]))
    with pytest.raises(ValueError, match=r"output_attentions.*layer 0.*use_cache=False"):
        model(IDS[:, 7:], output_attentions=True, **with_cache(model, cache))
    # Asking for maps left the same in the cache.
    steps = [model(IDS[:, 7:], **with_cache(model, one)).logits for one in (cache, plain)]
    torch.testing.assert_close(*steps)


def test_layers_without_maps_refuse_before_anything_is_computed():
    without = [
        e.name for e in registry.entries(LAYER)
        if not e.object.supports.maps and e.object.supports.causal
    ]  # fmt: skip
    assert without
    for attention in without:
        with pytest.raises(ValueError, match=r"output_attentions.*layer 1"):
            decoder(["softmax", attention])(IDS, output_attentions=True)


def test_maps_carry_gradients_where_the_output_is_their_sum():
    out = decoder()(IDS, output_attentions=True)
    out.attentions[0].retain_grad()
    out.logits.sum().backward()
    assert out.attentions[0].grad.abs().sum() > 0


# Caches -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["lightning-attention-2", ["softmax", "multi-token-attention"]])
def test_what_cannot_be_taken_back_is_not_assisted(attention):
    model, options = decoder(attention), {"max_new_tokens": 3, "do_sample": False}
    ids = IDS[:1]
    with pytest.raises(ValueError, match="stateful"):
        model.generate(ids, prompt_lookup_num_tokens=2, **options)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(ids, assistant_model=decoder(), **options)
    plain = decoder()
    with pytest.raises(ValueError, match="assistant_model"):
        plain.generate(ids, assistant_model=model, **options)
    assert torch.equal(
        plain.generate(ids, prompt_lookup_num_tokens=2, **options), plain.generate(ids, **options)
    )


def test_a_cache_that_is_given_is_used_or_refused():
    model = decoder()
    cache = DynamicCache()
    model(IDS[:, :7], use_cache=False, **with_cache(model, cache))
    rest = model(IDS[:, 7:], use_cache=False, **with_cache(model, cache)).logits
    torch.testing.assert_close(rest, model(IDS).logits[:, 7:])
    model.train()
    older = getattr(model, "gradient_checkpointing_enable", None)
    getattr(model, "activation_checkpointing_enable", older)({"use_reentrant": False})
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(IDS[:, 7:], **with_cache(model, cache))
    with torch.no_grad():  # nothing is recomputed
        model(IDS[:, 7:], **with_cache(model, cache))


# Arguments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model", [decoder(), classifier(), seq2seq(), made(EncoderForMaskedLM, attlas.EncoderConfig)],
    ids=lambda model: type(model).__name__,
)  # fmt: skip
def test_masks_of_another_length_and_unknown_arguments_are_refused(model):
    labels = {"labels": IDS} if isinstance(model, attlas.Seq2Seq) else {}
    for length in (7, 12):
        with pytest.raises(ValueError, match=r"attention_mask.*\[2, 9\]"):
            model(IDS, attention_mask=torch.ones(2, length), **labels)
    with pytest.raises(TypeError, match="head_mask"):
        model(IDS, head_mask=torch.ones(4), **labels)
    with pytest.raises(TypeError, match="token_type_ids"):
        model(IDS, token_type_ids=torch.ones_like(IDS), **labels)
    plain = model(IDS, token_type_ids=torch.zeros_like(IDS), return_dict=False, **labels)
    assert torch.equal(plain[1 if labels else 0], model(IDS, **labels).logits)


def test_seq2seq_takes_embeddings_and_gives_states_and_maps_of_both_sides():
    model = seq2seq()
    options = {"attention_mask": MASK, "output_hidden_states": True, "output_attentions": True}
    target, embed = IDS[:, :5], model.get_input_embeddings()
    by_ids = model(IDS, decoder_input_ids=target, **options)
    by_embeds = model(
        inputs_embeds=embed(IDS), decoder_inputs_embeds=embed(target), **options
    )  # fmt: skip
    assert torch.equal(by_ids.logits, by_embeds.logits)
    shapes = {
        "encoder_hidden_states": (3, (2, 9, 32)), "decoder_hidden_states": (3, (2, 5, 32)),
        "encoder_attentions": (2, (2, 4, 9, 9)), "decoder_attentions": (2, (2, 4, 5, 5)),
        "cross_attentions": (2, (2, 4, 5, 9)),
    }  # fmt: skip
    for name, (count, shape) in shapes.items():
        assert [tuple(x.shape) for x in by_ids[name]] == [shape] * count
    with pytest.raises(ValueError, match="decoder_inputs_embeds"):
        model(IDS, decoder_input_ids=target, decoder_inputs_embeds=embed(target))


def test_reentrant_checkpointing_gives_an_encoder_its_gradients_once():
    grads = []
    for checkpointing in (False, True):
        model = seq2seq().train()
        if checkpointing:
            older = getattr(model, "gradient_checkpointing_enable", None)
            getattr(model, "activation_checkpointing_enable", older)({"use_reentrant": True})
        model(IDS, labels=IDS).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name])


def test_an_embedding_that_a_checkpoint_lacks_is_told(tmp_path):
    model = seq2seq()
    state = {n: w for n, w in model.state_dict().items() if n not in ("shared.weight", "lm_head.weight")}
    model.save_pretrained(tmp_path, state_dict=state)
    _, told = attlas.Seq2Seq.from_pretrained(tmp_path, output_loading_info=True)
    assert "shared.weight" in told["missing_keys"]


def test_models_are_loaded_by_keyword_and_from_a_subfolder(tmp_path):
    model = decoder()
    model.save_pretrained(tmp_path / "inner")
    where = {"pretrained_model_name_or_path": tmp_path, "subfolder": "inner"}
    loaded = attlas.Decoder.from_pretrained(**where, attention="softmax")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    with pytest.raises(ValueError, match="checkpoint"):
        attlas.Decoder.from_pretrained(**where, attention="alibi")


# Configurations -----------------------------------------------------------------------------------


def test_sizes_that_are_not_given_are_those_of_the_first_layer():
    config = attlas.DecoderConfig(attention=["multi-query-attention", "softmax"], **SIZES)
    assert (config.num_key_value_heads, config.head_dim) == (1, 8)
    again = attlas.DecoderConfig.from_dict(copy.deepcopy(config).to_dict())
    assert (again.num_key_value_heads, again.head_dim) == (1, 8)
    again.hidden_size = 64
    assert again.head_dim == 16
    layers = attlas.Decoder(config).model.layers
    assert [block.attention.kv_heads for block in layers] == [1, 4]
    given = attlas.DecoderConfig(num_key_value_heads=2, head_dim=4, **SIZES)
    assert (given.num_key_value_heads, given.head_dim) == (2, 4)


# Losses -------------------------------------------------------------------------------------------


def test_problem_types():
    y = torch.tensor([[1, 0, 1], [0, 1, 0]])
    several = classifier(num_labels=3, problem_type="multi_label_classification")
    logits = several(IDS).logits
    want = torch.nn.functional.binary_cross_entropy_with_logits(logits, y.float())
    torch.testing.assert_close(several(IDS, labels=y).loss, want)
    with pytest.raises(ValueError, match="labels"):
        several(IDS, labels=y[:, 0])
    one, z = classifier(num_labels=1), torch.tensor([3.0, -2.0])
    want = (one(IDS).logits[:, 0] - z).square().mean()
    torch.testing.assert_close(one(IDS, labels=z).loss, want)
    assert one.config.problem_type == "regression"
    with pytest.raises(Exception, match="problem_type"):  # some versions refuse it in the configuration
        classifier(problem_type="ranking")(IDS, labels=y[:, 0])


IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SENTENCES = torch.randint(3, 50, (4, 6), generator=torch.Generator().manual_seed(0))
#: As labels: rows with different numbers of them.
BLANKED = SENTENCES.masked_fill(torch.arange(24).view(4, 6) % 7 < torch.arange(4)[:, None], -100)


def vit(**options):
    torch.manual_seed(0)
    sizes = {**SIZES, "image_size": 8, "patch_size": 4, **options}
    sizes.pop("vocab_size")
    return attlas.ViT(attlas.ViTConfig(**sizes))


@pytest.mark.parametrize(("make", "inputs", "labels"), [
    (lambda: decoder("mixture-of-head"), SENTENCES, BLANKED),
    (lambda: made(EncoderForMaskedLM, attlas.EncoderConfig), SENTENCES, BLANKED),
    (lambda: classifier(num_labels=2), SENTENCES, torch.tensor([0, 1, 1, 0])),
    (lambda: classifier(num_labels=1), SENTENCES, torch.tensor([0.5, 1.0, 2.0, -1.0])),
    (lambda: classifier(num_labels=2), SENTENCES, torch.rand(4, 2)),
    (seq2seq, SENTENCES, BLANKED),
    (vit, IMAGES, torch.tensor([0, 1, 1, 0])),
])  # fmt: skip
def test_losses_of_steps_add_up_to_that_of_the_batch(make, inputs, labels):
    model = make().train()
    shifted = labels[:, 1:] if isinstance(model, attlas.Decoder) else labels
    count = (shifted != -100).sum()
    steps = [
        model(i, labels=y, num_items_in_batch=count).loss
        for i, y in zip(inputs.split(2), labels.split(2), strict=True)
    ]
    whole = model(inputs, labels=labels, num_items_in_batch=count).loss
    torch.testing.assert_close(whole, model(inputs, labels=labels).loss)
    if not isinstance(model, attlas.Decoder):
        torch.testing.assert_close(sum(steps), whole)
        return
    # What the layers add is a mean over each step's tokens: weighted, and not added k times.
    extra = [model.train()(i, labels=y).loss - model.eval()(i, labels=y).loss
             for i, y in zip(inputs.split(2), labels.split(2), strict=True)]  # fmt: skip
    counts = [(y != -100).sum() / count for y in shifted.split(2)]
    want = model(inputs, labels=labels).loss + sum(e * c for e, c in zip(extra, counts, strict=True))
    torch.testing.assert_close(sum(steps), want)


def test_labels_that_are_shifted_already_are_taken():
    model = decoder()
    shifted = torch.nn.functional.pad(IDS[:, 1:], (0, 1), value=-100)
    want = model(IDS, labels=IDS).loss
    torch.testing.assert_close(model(IDS, shift_labels=shifted).loss, want)
    torch.testing.assert_close(model(IDS, labels=IDS, shift_labels=shifted).loss, want)


def test_the_trainer_takes_the_same_step_at_once_and_in_parts(tmp_path):
    def norm(batch, steps):
        arguments = hf.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=batch, gradient_accumulation_steps=steps,
            max_steps=1, learning_rate=0.0, logging_steps=1, report_to=[], use_cpu=True,
            max_grad_norm=1e9, seed=0,
        )  # fmt: skip
        rows = [{"input_ids": i, "labels": i.float().mean()} for i in SENTENCES]
        trainer = hf.Trainer(classifier(num_labels=1), arguments, train_dataset=rows)
        trainer.train()
        return next(r["grad_norm"] for r in trainer.state.log_history if "grad_norm" in r)

    assert norm(1, 4) == pytest.approx(norm(4, 1), rel=1e-3)
