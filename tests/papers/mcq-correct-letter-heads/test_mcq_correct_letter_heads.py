"""What the row of right-letter heads says, sentence by sentence."""

from __future__ import annotations

import pytest
import torch

import attlas
from attlas.analyses.mcq_correct_letter_heads import (
    CorrectLetterHeads,
    HeadSubspaces,
    Space,
    spaces,
)
from attlas.attach import attach
from attlas.contract.analyses import sample
from attlas.contract.families import find
from attlas.contract.parts import prompt, small_llama
from attlas.inspect.attribution import attribution
from attlas.inspect.runs import kept, logits_with, patched_heads, patched_together


def decoder():
    torch.manual_seed(0)
    config = attlas.DecoderConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    return attlas.Decoder(config).double().eval()


@pytest.mark.parametrize("name", ["llama", "gpt2", "ours"])
def test_mcq_correct_letter_heads_attributions_add_up_to_the_logit(name):
    model = decoder() if name == "ours" else find(name).model()
    ids = prompt(9, batch=3)
    size = model.get_output_embeddings().weight.shape[0]
    of = torch.zeros(3, size, dtype=torch.float64)
    of[:, 5], of[:, 9] = 1.0, -0.5
    found = attribution(model, ids, of)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, -1]
    expected = logits[:, 5] - 0.5 * logits[:, 9]
    torch.testing.assert_close(found.logit, expected.to(found.logit))
    torch.testing.assert_close(found.total, found.logit, rtol=0, atol=1e-4)


def test_mcq_correct_letter_heads_attribution_refuses_norms_behind_attention():
    model = find("gemma2").model()
    with pytest.raises(ValueError, match="the stream of Gemma2ForCausalLM is not what"):
        attribution(model, prompt(9), torch.ones(1, model.config.vocab_size))


def test_mcq_correct_letter_heads_attribution_of_a_head_is_what_its_absence_takes():
    """Of the last layer, whose output no other reads, up to the norm's size and the MLP's answer."""
    model, ids = small_llama(), prompt(9, batch=2)
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight.zero_()
    of = torch.zeros(2, 64, dtype=torch.float64)
    of[:, 5] = 1.0
    found = attribution(model, ids, of)
    run = kept(model, ids, ("final", "heads"))
    z = run.passed["heads"][-1, :, -1, 2]
    added = z @ model.model.layers[-1].self_attn.o_proj.weight[:, 16:24].T
    size = (run.passed["final"][0, :, -1].square().mean(-1) + model.config.rms_norm_eps).sqrt()
    direct = (added / size[:, None] * model.model.norm.weight) @ model.lm_head.weight[5]
    torch.testing.assert_close(found.heads[-1, 2], direct)


def test_mcq_correct_letter_heads_patch_heads_one_by_one_and_together():
    subject = sample("prompts")
    each = patched_heads(subject.model, subject.prompts, (-1,))
    one = patched_together(subject.model, subject.prompts, [(1, 3)], (-1,))
    assert one == pytest.approx(float(each[1, 3]), abs=1e-12)
    # The heads of the last layer meet in its MLP alone: without it they add up, but for the norm.
    assert patched_together(subject.model, subject.prompts, [(0, 0), (0, 1)]) != one


def test_mcq_correct_letter_heads_all_directions_are_the_model():
    model, ids = small_llama(), prompt(14, 8)
    heads = [(0, 1), (3, 2)]
    tokens = {"q": (-1,), "k": (3, 6, 9)}
    plain = logits_with(model, ids)
    whole = HeadSubspaces(**spaces(model, ids, heads, tokens, 8), k_tokens=(3, 6, 9))
    torch.testing.assert_close(logits_with(model, ids, whole), plain, rtol=1e-4, atol=1e-4)
    few = HeadSubspaces(**spaces(model, ids, heads, tokens, 1), k_tokens=(3, 6, 9))
    found = logits_with(model, ids, few)
    torch.testing.assert_close(found[:, :3], plain[:, :3])  # nothing in front of the first key changes
    assert not torch.allclose(found[:, -1], plain[:, -1], atol=1e-3)


def test_mcq_correct_letter_heads_projected_keys_lie_in_their_directions():
    """Before their rotation: at other positions too."""
    model, ids = small_llama(), prompt(14, 8)
    found = spaces(model, ids, [(0, 1)], {"q": (-1,), "k": (3, 6, 9)}, 2)
    space = found["k"][0, 1]
    torch.testing.assert_close(space.basis.T @ space.basis, torch.eye(2, dtype=torch.float64))
    seen = {}

    class Spy(HeadSubspaces):
        def position(self, call, q, k):
            seen[call.layer] = k, super().position(call, q, k)[1]
            return super().position(call, q, k)

    with torch.no_grad(), attach(model, Spy(q={}, k=found["k"], k_tokens=(3, 6))):
        model(ids)
    before, after = seen[0]
    assert torch.equal(before[:, 1], after[:, 1])  # key head 0 serves head 1
    rest = [n for n in range(14) if n not in (3, 6)]
    assert torch.equal(before[:, 0, rest], after[:, 0, rest])
    plain = model.model.layers[0].self_attn.k_proj(
        model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
    )[..., :8]
    left = space.project(plain[:, 3])
    assert float((left - plain[:, 3]).norm()) > 0.1
    torch.testing.assert_close(after[:, 0, 3].norm(dim=-1), left.norm(dim=-1), rtol=1e-5, atol=1e-5)


def test_mcq_correct_letter_heads_principal_directions():
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) @ torch.diag(
        torch.tensor([5.0, 4, 0.1, 0.1, 0.1, 0.1])
    )
    space = Space.of(x + 3, 2)
    torch.testing.assert_close(space.project(x + 3), x + 3, atol=0.6, rtol=0)
    assert space.basis[:2].norm() > 1.4


def test_mcq_correct_letter_heads_of_one_letter_tell_nothing():
    with pytest.raises(ValueError, match="letters"):
        CorrectLetterHeads(letters=(5,)).look(sample("prompts"))
