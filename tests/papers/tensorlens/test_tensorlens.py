"""What the row of TensorLens says, clause by clause."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from attlas.analyses.tensorlens import TensorLens, attention_only
from attlas.attach import attach
from attlas.errors import UserError
from attlas.inspect.subject import Subject

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 24, "initializer_range": 0.3,
}  # fmt: skip


def decoder():
    from attlas.models.decoder import Decoder, DecoderConfig

    return Decoder(DecoderConfig(**SIZES, num_key_value_heads=2))


def encoder():
    from attlas.models.encoder import EncoderConfig, EncoderForMaskedLM

    return EncoderForMaskedLM(EncoderConfig(**SIZES))


def llama():
    from transformers import LlamaConfig

    from attlas.hf.models import LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))


def exact_llama():
    """Its own norms round to float32 whatever the model is in; these do not."""
    model = llama()
    for module in list(model.modules()):
        for name, norm in module.named_children():
            if type(norm).__name__ == "LlamaRMSNorm":
                setattr(module, name, torch.nn.RMSNorm(16, eps=norm.variance_epsilon))
    return model


def bert():
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**SIZES))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=4, initializer_range=0.3)
    return GPT2LMHeadModel(config)


def biased(make):
    """A model in float64 whose biases and gains are random too."""
    torch.manual_seed(0)
    model = make().to(torch.float64).eval()
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            torch.nn.init.normal_(weight, 1.0 if "bias" not in name else 0.0, 0.3)
    return model


def output(model, ids, mask=None):
    """What a model gives behind its last norm."""
    out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    return out.hidden_states[-1]


IDS = torch.arange(12).reshape(2, 6) * 3 % 37 + 1


@torch.no_grad()
@pytest.mark.parametrize(
    "make", [decoder, encoder, exact_llama, llama, bert, gpt2], ids=lambda m: m.__name__
)
def test_tensor_times_embeddings_is_the_models_own_output(make):
    model = biased(make)
    found, bound = TensorLens().lenses(Subject(model, IDS)), 1e-5 if make is llama else 1e-9
    for row, (one, out) in enumerate(zip(found, output(model, IDS), strict=True)):
        whole, shift = one.tensor()
        made = torch.einsum("iajb,jb->ia", whole, one.embeddings) + shift
        assert (made - out).abs().max() < bound, row
        assert (one.pieces().sum(dim=1) + shift - out).abs().max() < bound
        blocks = torch.einsum("iajb,jb->ija", whole, one.embeddings)
        assert torch.allclose(one.reduced("input"), blocks.norm(dim=-1), atol=1e-10)
        assert torch.allclose(one.reduced("norm"), whole.norm(dim=(1, 3)), atol=1e-10)


@torch.no_grad()
def test_padding_is_left_out():
    model = biased(decoder)
    ids = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS], dim=1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(IDS)], dim=1)
    padded = TensorLens().lenses(Subject(model, ids, mask))
    for a, b in zip(padded, TensorLens().lenses(Subject(model, IDS)), strict=True):
        assert torch.allclose(a.reduced(), b.reduced(), atol=1e-6)


@torch.no_grad()
def test_a_causal_model_takes_nothing_from_later_tokens():
    found = TensorLens().look(Subject(biased(llama), IDS))
    assert float(found.arrays["map"].triu(1).abs().max()) == 0
    assert torch.allclose(found.arrays["flow"].sum(-1), torch.ones(2, 6, dtype=torch.float64))


@torch.no_grad()
def test_attention_alone_is_rollout_with_values_left_out():
    model = biased(encoder)
    with attach(model, record=["weights"]) as session:
        model(input_ids=IDS)
    patterns = session["weights"][:, 0]
    rollout = torch.eye(6, dtype=patterns.dtype)
    for layer in patterns:
        mixed = layer.mean(0) + torch.eye(6, dtype=patterns.dtype)
        rollout = mixed / mixed.sum(-1, keepdim=True) @ rollout
    assert torch.allclose(attention_only(patterns), rollout, atol=1e-12)


def test_long_texts_and_unknown_pieces_are_refused():
    with pytest.raises(UserError, match="most=4"):
        TensorLens(most=4).look(Subject(decoder(), IDS))


def classifier(seed):
    """A small classifier of texts, trained: which of three kinds of token is among them twice."""
    from attlas.models.encoder import EncoderConfig, EncoderForSequenceClassification

    torch.manual_seed(seed)
    config = EncoderConfig(vocab_size=32, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
                           intermediate_size=32, num_labels=3)  # fmt: skip
    model = EncoderForSequenceClassification(config)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(250):
        ids, labels = texts(64)
        loss = F.cross_entropy(model(input_ids=ids).logits, labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


def texts(rows, length=12):
    """Random tokens from 8 on, two of which are replaced by one of the label's own two."""
    ids, labels = torch.randint(8, 32, (rows, length)), torch.randint(3, (rows,))
    places = torch.rand(rows, length).argsort(-1)[:, :2]
    own = 2 * labels[:, None] + torch.randint(2, (rows, 2)) + 1
    return ids.scatter(1, places, own), labels


@torch.no_grad()
def deletion(model, ids, labels, importance):
    """Mean probability of the label while the most important tokens are taken out one by one."""
    order, kept, found = importance.argsort(-1, descending=True), torch.ones_like(ids), []
    for step in range(ids.shape[1] - 1):
        kept = kept.scatter(1, order[:, step : step + 1], 0)
        probability = model(input_ids=ids, attention_mask=kept).logits.softmax(-1)
        found.append(probability.gather(1, labels[:, None]).mean())
    return float(torch.stack(found).mean())


@torch.no_grad()
def curves(seed, rows=32):
    model = classifier(seed) if torch.is_grad_enabled() else _trained(seed)
    ids, labels = texts(rows)
    with attach(model, record=["weights"]) as session:
        model(input_ids=ids)
    patterns = session["weights"]
    lens = torch.stack([one.reduced().mean(0) for one in TensorLens().lenses(Subject(model, ids))])
    rollout = torch.stack([attention_only(patterns[:, row]).mean(0) for row in range(rows)])
    raw = patterns[-1].mean(dim=(1, 2))
    maps = {"lens": lens, "rollout": rollout, "raw": raw, "random": torch.rand(rows, ids.shape[1])}
    return {name: deletion(model, ids, labels, m) for name, m in maps.items()}


def _trained(seed):
    with torch.enable_grad():
        return classifier(seed)


def test_deletion_curve_beats_raw_attention_and_rollout():
    found = curves(0)
    assert found["lens"] < min(found["raw"], found["rollout"])
