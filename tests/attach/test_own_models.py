"""Our own decoders, encoders and pictures go through the same door as pretrained models."""

import copy

import pytest
import torch

import attlas
from attlas.attach import Part, attach
from attlas.errors import UserError
from attlas.hf.caches import cache_of, with_cache
from attlas.storage.plain import forked

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
#: Layers that attend as softmax attention does, so that every part works on them.
SOFTMAX = ("softmax", "grouped-query-attention", "qk-norm", "alibi")
#: Layers with a way of their own.
OTHERS = ("differential-transformer", "linear-attention", "multi-head-latent-attention")


def decoder(attention: str = "softmax", **options):
    torch.manual_seed(0)
    config = attlas.DecoderConfig(vocab_size=50, attention=attention, **SIZES, **options)
    return attlas.Decoder(config).double().eval()


def prompt(batch: int = 2, tokens: int = 20):
    torch.manual_seed(1)
    return torch.randint(1, 50, (batch, tokens))


def continued(model, ids, **options):
    out = model.generate(
        ids, max_new_tokens=5, do_sample=False, pad_token_id=0, return_dict_in_generate=True,
        output_logits=True, **options,
    )  # fmt: skip
    return torch.stack(out.logits)


@pytest.mark.parametrize("attention", [*SOFTMAX, *OTHERS, "latte", "castle-lookahead-keys"])
def test_recorders_see_the_layers_own_weights_and_change_nothing(attention):
    model, ids = decoder(attention), prompt()
    seen = {}
    layer = model.model.layers[1].attention
    handle = layer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(x=args[0], mask=kwargs["mask"]), with_kwargs=True
    )
    with torch.no_grad():
        plain = model(ids).logits
        expected = layer.weights(seen["x"])
        with attach(
            model, record=["weights", attlas.make("entropy", layers=[-1], heads=[0, 3])]
        ) as s:
            torch.testing.assert_close(model(ids).logits, plain)
        handle.remove()
    torch.testing.assert_close(s["weights"][1].to(expected.dtype), expected, atol=1e-6, rtol=1e-5)
    assert s["entropy"].shape == (1, 2, 2, 20)
    torch.testing.assert_close(model(ids).logits, plain, atol=0, rtol=0)


@pytest.mark.parametrize("attention", SOFTMAX)
def test_caches_and_steering_work_on_softmax_layers(attention):
    model, ids = decoder(attention), prompt()
    plain = continued(model, ids)
    with attach(model, attlas.make("snapkv", keep=1.0, window=4)):
        torch.testing.assert_close(continued(model, ids), plain)
    with attach(model, attlas.make("quantized-cache", bits=16, recent=4, key_group=4)):
        torch.testing.assert_close(continued(model, ids), plain)
    with attach(model, attlas.make("streaming-llm", tokens=8)) as session:
        continued(model, ids)
    layer = session.cache.layers[0]
    assert layer.keys.shape[2] == 8 + 4  # what was kept, and the generated tokens behind it
    steerer = attlas.make("spotlight", spans=[(2, 5)], share=0.5, exact=True)
    with torch.no_grad(), attach(model, steerer, record=["weights"]) as session:
        model(ids)
    share = session["weights"][..., 6:, 2:5].sum(-1)
    assert share.min() > 0.5 - 1e-6


@pytest.mark.parametrize("attention", SOFTMAX)
def test_padding_moves_nothing(attention):
    model, ids = decoder(attention), prompt(1)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], dim=1)
    mask = (padded != 0).long()
    for part in ("snapkv", "streaming-llm"):
        options = {"tokens": 10, **({"window": 4} if part == "snapkv" else {})}
        with attach(model, attlas.make(part, **options)):
            alone = continued(model, ids)
        with attach(model, attlas.make(part, **options)):
            together = continued(model, padded, attention_mask=mask)
        torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("attention", OTHERS)
def test_what_a_layer_cannot_give_is_refused_by_name(attention):
    model, ids = decoder(attention), prompt()
    plain = model(ids).logits
    for part in (
        attlas.make("snapkv", keep=0.5, window=4),
        attlas.make("spotlight", spans=[(0, 2)]),
    ):
        name = type(model.model.layers[0].attention).__name__
        with pytest.raises(UserError, match=f"{type(part).__name__} works on softmax.*{name}"):
            attach(model, part).__enter__()
    torch.testing.assert_close(model(ids).logits, plain, atol=0, rtol=0)


class Silence(Part):
    """Sets one head's output to 0."""

    def output(self, call, heads):
        return heads.index_fill(2, torch.tensor([1]), 0.0)


@pytest.mark.parametrize("attention", [*SOFTMAX, *OTHERS])
def test_outputs_of_heads_are_changed(attention):
    model, ids = decoder(attention), prompt()
    with torch.no_grad():
        plain = model(ids).logits
        with attach(model, Silence()):
            silent = model(ids).logits
        changed = copy.deepcopy(model)
        for block in changed.model.layers:
            block.attention.output = lambda heads, inputs, of=block.attention: type(of).output(
                of, heads.index_fill(1, torch.tensor([1]), 0.0), inputs
            )
        torch.testing.assert_close(silent, changed(ids).logits)
    assert not torch.allclose(silent, plain)


@pytest.mark.parametrize(
    ("options", "padded", "refused"),
    [
        ({}, False, False), ({"position": "alibi"}, False, True), ({"position": "t5"}, False, True),
        ({"attention": {"name": "window", "size": 9}}, False, True), ({}, True, True),
    ],
)  # fmt: skip
def test_a_cache_with_keys_left_out_goes_on_alone_unless_it_matters_where_they_stood(
    options, padded, refused
):
    model, ids = decoder(**options), prompt()
    mask = None
    if padded:
        mask = torch.ones(2, 21, dtype=torch.long)
        mask[0, :5] = 0
    with torch.no_grad():
        with attach(model, attlas.make("snapkv", tokens=12, window=3)):
            given = {} if mask is None else {"attention_mask": mask[:, :20]}
            cache = cache_of(model(ids, use_cache=True, **given))
            other = forked(cache)
            given = {} if mask is None else {"attention_mask": mask}
            inside = model(ids[:, :1], **with_cache(model, other), **given).logits
        if refused:
            with pytest.raises(UserError, match="cache: a policy has left some keys out"):
                model(ids[:, :1], **with_cache(model, cache), **given)
        else:
            torch.testing.assert_close(model(ids[:, :1], **with_cache(model, cache)).logits, inside)


def test_a_copy_made_inside_is_not_attached():
    model, ids = decoder(), prompt()
    plain = model(ids).logits
    with attach(model, Silence()):
        twin = copy.deepcopy(model)
        assert torch.equal(twin(ids).logits, plain)
    assert all(block.attention.door is None for block in model.model.layers)
    assert torch.equal(model(ids).logits, plain)


def test_encoders_pictures_and_both_sides_of_a_seq2seq():
    torch.manual_seed(0)
    encoder = attlas.Encoder(attlas.EncoderConfig(vocab_size=50, **SIZES)).eval()
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, 15:] = 0
    with torch.no_grad(), attach(encoder, record=["weights"]) as session:
        encoder(prompt(), attention_mask=mask)
    weights = session["weights"]
    assert weights.shape == (3, 2, 4, 20, 20)
    assert float(weights[:, 0, :, :15, 15:].abs().max()) == 0.0
    assert weights[:, 1].sum(-1).sub(1).abs().max() < 1e-5

    picture = attlas.ViT(
        attlas.ViTConfig(image_size=8, patch_size=2, num_channels=1, **SIZES)
    ).eval()
    with torch.no_grad(), attach(picture, record=["entropy"]) as session:
        picture(torch.randn(2, 1, 8, 8))
    assert session["entropy"].shape == (3, 2, 4, 16)

    config = attlas.Seq2SeqConfig(vocab_size=50, decoder_start_token_id=1, pad_token_id=0, **SIZES)
    both = attlas.Seq2Seq(config).eval()
    source, target = prompt(2, 12), prompt(2, 7)
    with torch.no_grad():
        plain = both(input_ids=source, decoder_input_ids=target).logits
        with attach(both, record=["weights"]) as session:
            torch.testing.assert_close(
                both(input_ids=source, decoder_input_ids=target).logits, plain
            )
        assert session["weights"].shape == (3, 2, 4, 7, 7)
        with attach(both, record=["massive-values"]) as session:
            both(input_ids=source, decoder_input_ids=target)
        assert session["massive-values"]["residual"].shape == (3, 2, 32)
        with attach(both.encoder, record=["weights"]) as session:
            both(input_ids=source, decoder_input_ids=target)
        assert session["weights"].shape == (3, 2, 4, 12, 12)
