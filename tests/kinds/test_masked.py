"""Adapters that hide pairs: any pattern reaches a pretrained model's attention, whatever its family."""

from __future__ import annotations

import pytest
import torch

import attlas
from attlas import masks
from attlas.attach import attach
from attlas.contract.families import distinct, find
from attlas.contract.parts import prompt
from attlas.hf.caches import DynamicCache, with_cache
from attlas.kinds.masked import Masked


class Near(Masked):
    """Toy: the last five tokens."""

    def pattern(self, tokens):
        return None if tokens.seen <= 5 else masks.window(5)


@pytest.mark.parametrize(
    "family", distinct("windows", "soft-caps", "sinks", "latents", "grouped", lacking=["states"])
)
def test_the_pattern_is_what_layers_read_in_pieces_too(family):
    model, ids = find(family).model(), prompt(20, 2)
    with Near().inject(model), attach(model, record=["weights"]) as session, torch.no_grad():
        whole = model(ids).logits
        seen = session["weights"].abs().sum((0, 1, 2)) > 0
        assert torch.equal(seen, masks.dense(masks.causal & masks.window(5), 20, 20)[0, 0])
    with Near().inject(model), torch.no_grad():
        torch.testing.assert_close(model(ids).logits, whole, rtol=1e-4, atol=1e-4)
        embeds = model.get_input_embeddings()(ids)
        if family != "gemma3n":  # it reads ids beside embeddings
            told = model(inputs_embeds=embeds).logits
            torch.testing.assert_close(told, whole, rtol=1e-4, atol=1e-4)
        cache = DynamicCache(config=model.config)
        pieces = [model(p, **with_cache(model, cache)).logits for p in ids.split([3, 9, 1, 1, 6], 1)]
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["jamba", "qwen3-next"])
def test_models_with_layers_that_take_no_mask_are_refused(family):
    model = find(family).model()
    with pytest.raises(ValueError, match=model.config.model_type):
        Near().inject(model)


def test_bidirectional_models_and_other_implementations_are_refused():
    from tiny_models import bert

    with pytest.raises(ValueError, match="bert"):
        Near().inject(bert())
    with pytest.raises(ValueError, match="flex_attention"):
        Near().inject(find("llama").model("flex_attention"))


def test_masks_of_pairs_that_users_give_are_narrowed():
    model, ids = find("llama").model(), prompt(12)
    given = masks.dense(masks.causal & ~masks.sinks(2) | masks.window(1), 12, 12)
    with Near().inject(model), torch.no_grad():
        ours = model(ids, attention_mask=given).logits
    with torch.no_grad():
        both = given & masks.dense(masks.window(5), 12, 12)
        torch.testing.assert_close(ours, model(ids, attention_mask=both).logits)


def test_a_toy_passes_the_contract_but_for_what_it_hides():
    found = {result.check: result.status for result in attlas.check(Near, raises=False)}
    assert {check for check, status in found.items() if status != "passed"} <= {
        "identity-at-the-start", "saved"
    }  # fmt: skip
