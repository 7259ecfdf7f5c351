"""Packed texts: rows whose positions begin anew, with neither a mask nor a cache."""

import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import attlas
from attlas.catalog import registry
from attlas.catalog.kinds import LAYER
from attlas.hf.caches import cache_of
from attlas.models.packing import Packing

SIZES = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
#: Lengths of the texts of two rows; one text begins behind 0.
TEXTS = ((3, 5, 1), (6, 3))
IDS = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(1))
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 4, 5, 7, 8, 9]])
CAUSAL = [entry.name for entry in registry.entries(LAYER) if entry.object.supports.causal]


def texts():
    """(ids, positions) of each text by itself."""
    for row, lengths in enumerate(TEXTS):
        ids, positions = IDS[row].split(lengths), POSITIONS[row].split(lengths)
        yield from zip(ids, positions, strict=True)


def decoder(attention, **options):
    torch.manual_seed(0)
    heads = {"num_attention_heads": 1} if attention in ("mega", "mega-chunk") else {}
    sizes = {**SIZES, **heads, "attention": attention, "initializer_range": 0.3, **options}
    return attlas.Decoder(attlas.DecoderConfig(**sizes)).double().eval()


def assert_texts_are_apart(model):
    with torch.no_grad():
        packed = model(IDS, position_ids=POSITIONS).logits
        alone = [model(i[None], position_ids=p[None]).logits[0] for i, p in texts()]
    torch.testing.assert_close(packed.flatten(0, 1), torch.cat(alone), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("attention", CAUSAL)
def test_no_mechanism_sees_two_texts(attention):
    assert_texts_are_apart(decoder(attention))


@pytest.mark.parametrize(
    "pattern", [["window", "arwkv-rwkv7"], ["gated-linear-attention", "differential-transformer"]]
)
def test_nor_does_a_hybrid_and_what_is_asked_for_besides_is_joined(pattern):
    model = decoder(pattern, num_hidden_layers=2, sliding_window=2)
    assert_texts_are_apart(model)
    with torch.no_grad():
        out = model(
            IDS, position_ids=POSITIONS, output_attentions=True, output_hidden_states=True,
            use_cache=True,
        )  # fmt: skip
    assert cache_of(out) is None
    assert [tuple(h.shape) for h in out.hidden_states] == [(2, 9, 16)] * 3
    number = torch.stack([torch.arange(len(n)).repeat_interleave(torch.tensor(n)) for n in TEXTS])
    apart = number[:, None, :, None] != number[:, None, None, :]
    for weights in out.attentions:
        assert weights.shape == (2, 2, 9, 9)
        assert not weights.masked_select(apart).any()
        assert weights.masked_select(~apart).any()


def test_a_swapped_model_keeps_texts_apart_in_all_layers():
    torch.manual_seed(0)
    sizes = {**SIZES, "num_hidden_layers": 2, "intermediate_size": 16, "initializer_range": 0.3}
    model = LlamaForCausalLM(LlamaConfig(**sizes)).double().eval()
    attlas.swap(model, "lightning-attention-2", layers=[1])
    assert_texts_are_apart(model)
    with pytest.raises(ValueError, match="attention_mask"):
        model(IDS, attention_mask=torch.ones(2, 7, dtype=torch.long))


def test_gradients_are_those_of_the_texts():
    grads = []
    for packed in (True, False):
        model = decoder("lightning-attention-2").train()
        batches = [(IDS, POSITIONS)] if packed else [(i[None], p[None]) for i, p in texts()]
        sum(model(i, position_ids=p).logits.square().sum() for i, p in batches).backward()
        grads.append([p.grad for p in model.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-7)


def test_one_text_a_row_is_not_packed():
    assert Packing.of(torch.arange(9)[None] + torch.tensor([[0], [4]])) is None
    model, mask = decoder("softmax"), torch.ones_like(IDS)
    positions = torch.arange(9).expand(2, -1)
    torch.testing.assert_close(model(IDS, position_ids=positions).logits, model(IDS).logits)
    # With a mask or a cache the positions only say where tokens stand, as in Transformers.
    masked = model(IDS, position_ids=POSITIONS, attention_mask=mask).logits
    assert (masked - model(IDS, position_ids=POSITIONS).logits).abs().max() > 1e-3


COMPILED = """
import attlas, torch
ids, positions = torch.arange(3, 12)[None], torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0]])
for attention, whole in (("softmax", True), ("lightning-attention-2", False)):
    model = attlas.Decoder(attlas.DecoderConfig(
        vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, attention=attention,
        initializer_range=0.3,
    )).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=whole)
    with torch.no_grad():
        packed = compiled(ids, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(packed, model(ids, position_ids=positions).logits)
"""


def test_compiled_models_keep_texts_apart():
    # In a process without the checks of shapes, which cannot be traced. Layers that take no mask of
    # pairs ask for the positions, which breaks the graph.
    subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILED], check=True)


def test_bounds_without_positions_are_refused():
    model = decoder("softmax")
    bounds = torch.tensor([0, 3, 8, 9])
    with pytest.raises(TypeError, match="cu_seq_lens_q"):
        model(IDS[:1], cu_seq_lens_q=bounds)
    model(IDS[:1], cu_seq_lens_q=bounds, position_ids=POSITIONS[:1])
