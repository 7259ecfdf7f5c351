"""tkl-local-retrieval: every clause of the catalogue row's works_when, and the network's parts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import attlas
from attlas import masks
from attlas.bases.kernel_ranking import NEIGHBOURS, LocalRanker
from attlas.contract.layers.numbers import LargestTensor
from attlas.errors import UserError
from attlas.kinds.system import scores
from attlas.systems.tkl_local_retrieval import TKL
from attlas.tasks.retrieval import TRAINED, corpus

SMALL = {"dim": 16, "heads": 2, "layers": 1, "ff": 32, "chunk": 8, "overlap": 3, "window": 6}
SYSTEM = {
    "dim": 32, "heads": 2, "layers": 1, "ff": 32, "lengths": (240,), "first": 80, "questions": 30,
    "batch": 8, "rate": 1e-3, "steps": 30,
}  # fmt: skip


def made(**options: Any) -> LocalRanker:
    torch.manual_seed(0)
    return LocalRanker(**{**SMALL, **options}).double()


def texts(words: int = 37, terms: int = 4, batch: int = 2) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    query, document = (torch.randn(batch, n, 16, dtype=torch.float64) for n in (terms, words))
    seen = torch.ones(batch, words, dtype=torch.bool)
    seen[-1, words // 2 :] = False
    return query, document, torch.ones(batch, terms, dtype=torch.bool), seen


def means(system: TKL, seed: int = 0) -> tuple[float, float]:
    """The mean reciprocal rank of the system and of its baseline."""
    (cell,) = system.cells
    examples = system.data(cell, seed)
    inputs = [example.input for example in examples]
    said = system.predict(inputs), system.guess(inputs, seed)
    own, trivial = (sum(scores(system, each, examples)) / len(examples) for each in said)
    return own, trivial


# Chunked encoding equals windowed attention for inner tokens ----------------------------------------


def test_tkl_local_retrieval_chunks_are_windows_of_one_layer():
    ranker = made(places=False)
    _, document, _, _ = texts()
    seen = torch.ones(2, 37, dtype=torch.bool)
    chunk = torch.arange(37) // ranker.chunk * ranker.chunk
    key = torch.arange(37)
    pairs = (key >= chunk[:, None] - ranker.overlap) & (
        key < chunk[:, None] + ranker.chunk + ranker.overlap
    )
    block = ranker.blocks[0]
    y = block.norm1(document + block.attention(document, mask=pairs[None, None]))
    y = block.norm2(y + block.down(block.up(y).relu()))
    whole = ranker.mixer * document + (1 - ranker.mixer) * y
    torch.testing.assert_close(ranker.read(document, seen)[:, :37], whole)


@pytest.mark.parametrize(("layers", "reach"), [(1, 3), (3, 1)])
def test_tkl_local_retrieval_inner_tokens_see_what_a_sliding_window_shows_over_all_layers(layers, reach):
    """Words within `reach` of each other: layers · reach ≤ overlap, so that no chunk cuts one off."""
    ranker = made(layers=layers, places=False)
    near = masks.window(reach + 1)
    for block in ranker.blocks:
        block.attention.pattern = near
    _, document, _, seen = texts()
    whole = ranker.encode(document, seen, None)
    torch.testing.assert_close(ranker.read(document, seen)[:, :37], whole)
    ranker.overlap = layers * reach - 1
    assert not torch.allclose(ranker.read(document, seen)[:, :37], whole)


def test_tkl_local_retrieval_one_chunk_is_attention_over_the_whole_document():
    ranker = made(chunk=37, overlap=0, layers=2)
    _, document, _, seen = texts()
    whole = ranker.encode(document, seen, ranker.document_places)
    torch.testing.assert_close(ranker.read(document, seen), whole)


# Memory grows linearly ------------------------------------------------------------------------------


def test_tkl_local_retrieval_memory_grows_linearly():
    ranker, largest = made(), []
    for words in (320, 640, 1280):
        query, document, asked, _ = texts(words)
        with LargestTensor() as held, torch.no_grad():
            ranker(query, document, asked, torch.ones(2, words, dtype=torch.bool))
        largest.append(held.elements)
    assert largest[1] <= 2.05 * largest[0]
    assert largest[2] <= 2.05 * largest[1]


def test_tkl_local_retrieval_chunks_of_padding_are_not_read():
    ranker, read = made(), []
    ranker.blocks[0].register_forward_hook(lambda block, given, y: read.append(y.shape[0]))
    _, document, _, seen = texts(80)
    ranker.read(document, seen)
    assert read == [10 + 5]


# Its reciprocal rank beats the truncate-to-n baseline by a clear margin ------------------------------


def test_tkl_local_retrieval_beats_rankers_of_truncated_documents():
    """Passages stand behind the first 80 of 240 words. Cut to these, neither the same ranker nor one
    trained on cut documents ranks better than chance, 0.29 of ten documents."""
    whole = attlas.make("tkl", **SYSTEM)
    whole.fit(0)
    own, counted = means(whole)
    cut = attlas.make("tkl", **SYSTEM, read=80)
    cut.net = whole.net
    same = means(cut)[0]
    cut.fit(0)
    trained = means(cut)[0]
    assert own > max(same, trained, counted) + 0.3, (own, same, trained, counted)


def test_tkl_local_retrieval_first_words_tell_nothing():
    system = attlas.make("tkl", **{**SYSTEM, "questions": 400})
    chance = sum(1 / rank for rank in range(1, 11)) / 10
    inputs = system.data("240 words", 0)
    ranked = scores(system, system.guess([e.input for e in inputs], 0), inputs)
    assert sum(ranked) / 400 == pytest.approx(chance, abs=0.05)  # standard error 0.014


def test_tkl_local_retrieval_splits_share_no_text():
    system = attlas.make("tkl", **SYSTEM)
    words = corpus()
    edge = round(TRAINED * len(words))
    learned = {words[i : i + 6] for i in range(edge - 5)}
    for example in system.data("240 words", 0):
        query, documents = example.input.query, example.input.documents
        for number, document in enumerate(documents):
            runs = {document[i : i + 6] for i in range(len(document) - 5)}
            assert len(runs & learned) < 0.05 * len(runs)
            assert all(word in document for word in query)
            beyond = [w for w in document[system.first :] if w in query]
            assert number not in example.target or len(beyond) >= len(query)


# The network ----------------------------------------------------------------------------------------


def by_loops(ranker: LocalRanker, query: Tensor, document: Tensor, words: int) -> Tensor:
    """The score of one document, from the equations, of vectors in context."""
    found = []
    for start in range(0, len(document) - ranker.window + 1, 2):
        inside = range(start, min(start + ranker.window, words))
        per_kernel = torch.zeros(len(ranker.centres), dtype=torch.float64)
        for q in query:
            sums = torch.zeros_like(per_kernel)
            for j in inside:
                cosine = torch.cosine_similarity(q, document[j], dim=0)
                sums += torch.exp(-((cosine - ranker.mu) ** 2) / (2 * ranker.sigma**2))
            if ranker.saturation == "log":
                per_kernel += (sums * ranker.kernel_scale).clamp(min=1e-10).log()
            else:
                told = torch.stack((ranker.salience(q)[0], torch.tensor(float(len(inside))).double()))
                a, b, c = ranker.saturate(ranker.norm(told))
                per_kernel += a * sums.clamp(min=1e-10) ** (1 / b) - c
        found.append((per_kernel @ ranker.kernel_weights) if inside else None)
    left = {n: float(s.detach()) for n, s in enumerate(found) if s is not None}
    total = torch.zeros((), dtype=torch.float64)
    for rank in range(ranker.regions):
        best = max(left, key=left.__getitem__)
        left = {n: s for n, s in left.items() if abs(n - best) >= ranker.window / 2}
        for weight, offset in zip(ranker.region_weights[:, rank], NEIGHBOURS, strict=True):
            score = found[min(max(best + offset, 0), len(found) - 1)]
            total = total + (0 if score is None else weight * score)
    return total


@pytest.mark.parametrize("saturation", ["embedding", "log"])
def test_tkl_local_retrieval_scores_are_those_of_the_equations(saturation):
    ranker = made(saturation=saturation, centres=(1.0, 0.4, -0.3), widths=(0.1, 0.2, 0.3), regions=2)
    with torch.no_grad():
        for weight in (ranker.region_weights, ranker.kernel_weights):
            weight.uniform_(0.5, 1.5)
        if saturation == "log":
            ranker.kernel_scale.uniform_(0.5, 1.5)
    query, document, asked, seen = texts(61)
    got = ranker(query, document, asked, seen)
    encoded = ranker.encode(query, asked, ranker.query_places)
    read = ranker.read(document, seen)
    for row in range(2):
        wanted = by_loops(ranker, encoded[row], read[row], int(seen[row].sum()))
        torch.testing.assert_close(got[row], wanted)


def test_tkl_local_retrieval_saturation_begins_as_a_logarithm():
    sums = torch.tensor([0.1, 1.0, 5.0, 30.0])
    torch.testing.assert_close(100 * sums ** (1 / 100) - 100, sums.log(), atol=0.06, rtol=0.01)
    ranker = made()
    assert ranker.saturate.bias.eq(100).all()
    assert ranker.saturate.weight.abs().max() <= 0.014


def test_tkl_local_retrieval_padding_changes_no_score():
    ranker = made()
    query, document, asked, _ = texts(40)
    seen = torch.ones(2, 40, dtype=torch.bool)
    plain = ranker(query, document, asked, seen)
    noise = torch.full((2, 24, 16), 7.0, dtype=torch.float64)
    more = torch.zeros(2, 24, dtype=torch.bool)
    longer = ranker(query, torch.cat((document, noise), 1), asked, torch.cat((seen, more), 1))
    torch.testing.assert_close(longer, plain)
    wider = ranker(
        torch.cat((query, noise[:, :3]), 1), document, torch.cat((asked, more[:, :3]), 1), seen
    )
    torch.testing.assert_close(wider, plain)
    assert ranker(query, document, asked, torch.zeros_like(seen)).eq(0).all()


def test_tkl_local_retrieval_reads_the_last_words():
    """Of 41 words the authors' code reads 40, chunks being of 8 with 3 on either side."""
    ranker = made()
    _, document, _, _ = texts(41)
    read = ranker.read(document, torch.ones(2, 41, dtype=torch.bool))
    assert read.shape[1] == 48
    assert read[:, 40].abs().sum() > 0
    assert read[:, 41:].eq(0).all()


@pytest.mark.parametrize("saturation", ["embedding", "log"])
def test_tkl_local_retrieval_every_weight_learns(saturation):
    ranker = made(saturation=saturation)
    with torch.no_grad():
        for weight in ranker.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    copied = copy.deepcopy(ranker)
    ranker(*texts()).square().sum().backward()
    idle = [n for n, w in ranker.named_parameters() if w.grad is None or not w.grad.abs().any()]
    assert idle == []
    torch.testing.assert_close(copied(*texts()), ranker(*texts()))


def test_tkl_local_retrieval_kernels_are_not_rounded():
    ranker = made().float()
    given = [t.float() if t.is_floating_point() else t for t in texts()]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = ranker(*given)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, ranker(*given), atol=0.5, rtol=0.05)


def test_tkl_local_retrieval_stands_on_the_meta_device():
    ranker, given = made(), texts()
    with torch.device("meta"):
        empty = LocalRanker(**SMALL)
    empty = empty.to_empty(device="cpu").double()
    empty.load_state_dict(ranker.state_dict())
    torch.testing.assert_close(empty(*given), ranker(*given))


def test_tkl_local_retrieval_refuses_what_it_cannot_do():
    with pytest.raises(UserError, match="query takes at most 30"):
        made()(*texts(terms=31))
    with pytest.raises(UserError, match="heads must divide dim=16"):
        made(heads=3)
    with pytest.raises(UserError, match="widths takes one for each"):
        made(centres=(1.0, 0.0), widths=(0.1,))
    with pytest.raises(UserError, match="too short"):
        attlas.make("tkl", lengths=(200,), first=180)
    with pytest.raises(UserError, match="lengths takes several"):
        attlas.make("tkl", lengths=())
    system = attlas.make("tkl", **SYSTEM)
    with pytest.raises(UserError, match="call fit"):
        system.predict([system.data("240 words", 0)[0].input])
