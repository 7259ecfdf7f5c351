"""What the row of secondary sinks says, clause by clause."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from attlas.attach import attach
from attlas.contract.cases import load_cases, run_case
from attlas.contract.parts import prompt, small_llama
from attlas.hf.caches import cache_of, with_cache
from attlas.parts.record.secondary_sinks import SecondarySinks
from attlas.tasks.text import passage

HERE = Path(__file__).parent
RESULTS = HERE.parents[2] / "benchmarks" / "results" / "secondary-sinks-cpu.json"


@pytest.mark.parametrize("case", load_cases(HERE / "golden"), ids=lambda c: c.label)
def test_published_vectors(case):
    assert [r.reason for r in run_case(case) if r.status != "passed"] == []


def planted(born=3, erased=6, at=5, size=30.0):
    """A Llama of eight blocks whose MLPs alone write: the first token's direction in block 1, taken back
    in block 7; the same for the token at a place in the blocks told."""
    from attlas.contract.families import find
    from attlas.hf.models import LlamaForCausalLM

    torch.manual_seed(0)
    config = find("llama").config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    direction = torch.randn(32)
    direction /= direction.norm()
    writes = {(1, 0): size, (7, 0): -size, (born, at): size / 2, (erased, at): -size / 2}
    for number, block in enumerate(model.model.layers):
        here = {place: much for (layer, place), much in writes.items() if layer == number}
        if here:
            block.mlp.register_forward_hook(_writing(here, direction))
    return model


def _writing(here, direction):
    def write(module, args, output):
        output = output.clone()
        for place, much in here.items():
            output[:, place] += much * direction
        return output

    return write


def recorded(model, *pieces, **given):
    recorder, cache = SecondarySinks(), None
    with torch.no_grad(), attach(model, record=[recorder]):
        for piece in pieces:
            more = {"use_cache": True} if cache is None else with_cache(model, cache)
            cache = cache_of(model(piece, **more, **given))
    return recorder


@pytest.mark.parametrize(("born", "erased"), [(3, 6), (2, 4), (4, 5)])
def test_secondary_sinks_are_born_and_die_where_an_mlp_says(born, erased):
    """Planted by the MLP of layer 3 and erased in layer 6: birth 3, lifetime 3."""
    (sink,) = recorded(planted(born, erased), prompt(16)).sinks()
    assert (sink.token, sink.birth, sink.lifetime, sink.writer) == (5, born, erased - born, born)
    assert sink.norm == pytest.approx(15, rel=0.2)  # what the other blocks write is there, too
    assert sink.write_norm == pytest.approx(15, rel=0.1)


def test_secondary_sinks_none_beside_the_primary_one():
    recorder = recorded(planted(at=0), prompt(16))
    assert recorder.sinks() == []
    assert recorder.sink_map()[:, 0].any(dim=0).nonzero().flatten().tolist() == [0]


@pytest.mark.parametrize("sizes", [[10, 6], [4, 1, 1, 10], [1, 15]])
def test_secondary_sinks_of_pieces_are_those_of_one_pass(sizes):
    model, ids = small_llama(), prompt(16, 2)
    whole, pieces = recorded(model, ids), recorded(model, *ids.split(sizes, dim=1))
    for name, value in whole.result().items():
        torch.testing.assert_close(pieces.result()[name], value, msg=name)
    assert torch.equal(pieces.sink_map(), whole.sink_map())


@pytest.mark.parametrize("side", ["left", "right"])
def test_secondary_sinks_leave_padding_out(side):
    model, ids = small_llama(), prompt(14)
    empty = torch.zeros_like(ids[:, :4])
    padded = torch.cat([empty, ids] if side == "left" else [ids, empty], dim=1)
    mask = (padded != 0).long()
    own = slice(4, None) if side == "left" else slice(None, 14)
    found = recorded(model, padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    alone = recorded(model, ids)
    for name, value in alone.result().items():
        torch.testing.assert_close(found.result()[name][..., own], value, msg=name)
    assert torch.equal(found.sink_map()[..., own], alone.sink_map())


def test_secondary_sinks_are_received_by_those_that_see_them():
    """Of a model that sees both ways every query counts, with a window those in it."""
    from attlas.models.decoder import Decoder, DecoderConfig
    from attlas.models.encoder import EncoderConfig, EncoderForMaskedLM

    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoder = EncoderForMaskedLM(EncoderConfig(**sizes)).eval()
    received = recorded_of(encoder, prompt(12))
    torch.testing.assert_close(received.sum(-1), torch.ones(2, 1, 2))
    decoder = Decoder(DecoderConfig(**sizes, attention="window", sliding_window=4)).eval()
    seen = torch.tensor([4.0] * 9 + [3, 2, 1])
    found = (recorded_of(decoder, prompt(12)) * seen).sum(-1)
    torch.testing.assert_close(found, torch.full((2, 1, 2), 12.0))


def recorded_of(model, ids):
    recorder = SecondarySinks()
    with torch.no_grad(), attach(model, record=[recorder]):
        model(ids)
    return recorder.received()


def test_secondary_sinks_states_are_smollm2s_own(smollm2):
    model, tokenizer = smollm2
    ids = tokenizer(passage(random.Random(0), 200), return_tensors="pt").input_ids[:, :32]
    found = recorded(model, ids).result()
    with torch.no_grad():
        states = torch.stack(model(ids, output_hidden_states=True).hidden_states[1:-1])
    torch.testing.assert_close(found["norm"][:-1], states.norm(dim=-1), rtol=1e-4, atol=1e-3)


def test_secondary_sinks_report_of_smollm2():
    """What benchmarks/secondary_sinks.py found over 50 passages."""
    record = json.loads(RESULTS.read_text())["results"]
    told = {row["what"]: row for row in record}
    assert told["passages"]["n"] >= 50
    strengths = [row["share"] for row in record if row["what"] == "primary sink"]
    assert len(strengths) == 30
    assert max(strengths) > 0.3
    ranks = told["write norm and lifetime"]
    if ranks["n"] >= 10:
        assert ranks["rank_correlation"] > 0


@pytest.mark.parametrize(
    ("options", "named"), [({"primary": -1}, "primary"), ({"threshold": 1.0}, "threshold")]
)
def test_secondary_sinks_refuse_by_name(options, named):
    with pytest.raises(ValueError, match=named):
        SecondarySinks(**options)
