"""What the row of MAPS says, clause by clause."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attlas.analyses.maps_head_parameters import (
    MapsHeadParameters,
    Reading,
    salient,
    scored,
    seen_at_work,
    spelled_pairs,
)  # fmt: skip
from attlas.contract.cases import load_cases, run_case
from attlas.contract.parts import small_llama
from attlas.errors import UserError
from attlas.inspect.readout import readout
from attlas.inspect.runs import kept
from attlas.inspect.subject import Subject
from attlas.inspect.weights import head_weights

HERE = Path(__file__).parent


@pytest.mark.parametrize("case", load_cases(HERE / "golden"), ids=lambda c: c.label)
def test_published_vectors(case):
    assert [r.reason for r in run_case(case) if r.status != "passed"] == []


class Words:
    """A tokenizer of words that are numbers."""

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids):
        return " ".join(map(str, ids))


def planted(pairs=50, at=(1, 2), width=128):
    """A decoder of ours, random but for a head whose W_V W_O maps 50 tokens to 50 others."""
    from attlas.models.decoder import Decoder, DecoderConfig

    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=400, hidden_size=width, intermediate_size=32, num_hidden_layers=2, head_dim=64,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1,
    )  # fmt: skip
    model = Decoder(config).eval()
    tokens = torch.randperm(400)[: 2 * pairs].reshape(2, pairs)
    embedding = model.model.embed_tokens.weight
    layer, head = at
    attention = model.model.layers[layer].attention
    with torch.no_grad():
        # V gives each source a coordinate of its own, O writes the target there.
        source, target = embedding[tokens[0]], embedding[tokens[1]]
        own = torch.linalg.pinv(source)  # [width, pairs]
        v = attention.v_proj.weight.unflatten(0, (2, 64))
        o = attention.o_proj.weight.unflatten(1, (4, 64))
        v[head // 2].zero_()
        v[head // 2, :pairs] = own.T
        o[:, head] = 0
        o[:, head, :pairs] = target.T
    return model, tokens.T.tolist()


def test_a_planted_head_has_score_one_and_others_chance():
    model, pairs = planted()
    relation = {"planted": [(str(a), str(b)) for a, b in pairs]}
    analysis = MapsHeadParameters(relation, mlp=False, copied=0)
    found = analysis.look(Subject(model, tokenizer=Words()))
    share = found.heads["planted"].values
    assert float(share[1, 2]) == 1.0
    share[1, 2] = 0.0
    assert float(share.max()) <= 0.2  # chance is 10 of 400
    table = found.tables[0].rows
    told = dict(pairs)
    assert all(row[1:3] == (1, 2) for row in table)
    sources = {int(row[3]): row[5].split() for row in table if int(row[3]) in told}
    assert len(sources) >= 6
    assert all(str(told[token]) == mapped[0] for token, mapped in sources.items())


@torch.no_grad()
def test_grouped_heads_use_the_right_slice_of_v():
    """A head that reads one token alone, run: what it gives is that token's row, but for the size."""
    model = small_llama()
    reading = Reading(model, readout(model), mlp=False)
    ids = torch.tensor([[7], [9]])
    given = kept(model, ids, ("heads",)).passed["heads"][0, :, 0]  # of one token, its own value
    size = model.get_input_embeddings()(ids[:, 0]).square().mean(-1, keepdim=True).sqrt()
    for head in range(given.shape[1]):
        ours = reading.written(0, head, reading.sources(0, ids[:, 0]))
        run = given[:, head] @ head_weights(model, 0).o[head] * size
        assert torch.allclose(ours, run, rtol=1e-4, atol=1e-6), head


@torch.no_grad()
def test_suppression_is_the_relation_of_minus_m():
    model = small_llama()
    reading, ids = Reading(model, readout(model)), torch.tensor([3, 5, 8])
    top, low = scored(reading, 1, reading.sources(1, ids), torch.tensor([4, 6, 9]))
    weight = model.model.layers[1].self_attn.o_proj.weight
    weight.neg_()
    turned = scored(reading, 1, reading.sources(1, ids), torch.tensor([4, 6, 9]))
    weight.neg_()
    assert torch.equal(turned[0], low)
    assert torch.equal(turned[1], top)


@torch.no_grad()
def test_salient_tokens_are_those_of_the_whole_matrix():
    model = small_llama()
    reading = Reading(model, readout(model))
    found = salient(reading, 1, 0, tokens=5, mappings=3)
    x = reading.sources(1, torch.arange(64))
    grown = (reading.written(1, 0, x).norm(dim=-1) / x.norm(dim=-1)).nan_to_num()  # padding is zero
    assert torch.equal(found.tokens, grown.topk(5).indices)
    assert torch.equal(found.mappings, reading.logits(1, 0, x).topk(3).indices[found.tokens])


def test_words_need_a_tokenizer_and_long_ones_are_left_out():
    with pytest.raises(UserError, match="tokenizer"):
        MapsHeadParameters({"a": [("1", "2")]}).look(Subject(small_llama()))
    assert spelled_pairs([("1", "2"), ("1 2", "3")], Words()).tolist() == [[1, 2]]


@torch.no_grad()
def test_scores_at_inference_of_a_planted_head():
    model, pairs = planted(at=(0, 2))

    class Tokenizer(Words):
        def __call__(self, text, add_special_tokens=False, return_tensors=None):
            if return_tensors:
                return {"input_ids": torch.tensor([[1]])}
            return super().__call__(text)

    with torch.no_grad():  # the head attends to its own token alone
        model.model.layers[0].attention.q_proj.weight.mul_(0)
    subject = Subject(model, tokenizer=Tokenizer())
    found = seen_at_work(subject, [(str(a), str(b)) for a, b in pairs], top=10)
    assert float(found[0, 2]) > 0.9
    assert float(found[1].max()) < 0.3
