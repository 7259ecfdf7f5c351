"""What the row of the multiscale view says, sentence by sentence."""

from __future__ import annotations

import re

import pytest
import torch

from attlas.attach import attach
from attlas.contract.parts import prompt, small_llama
from attlas.hf.caches import cache_of, with_cache
from attlas.parts.record.multiscale_attention_view import MultiscaleAttentionView
from attlas.view.look.atlas import Atlas, read_back
from browsing import opened, until
from real_models import fetched

SENTENCE = "The keeper counted the lights of the fishing boats, and drew a small circle for each of them."


def recorded(model, *pieces, mask=None, **options):
    view, cache, at = MultiscaleAttentionView(**options), None, 0
    with torch.no_grad(), attach(model, record=[view]):
        for piece in pieces:
            given = {"use_cache": True} if cache is None else with_cache(model, cache)
            at += piece.shape[1]
            if mask is not None:
                given["attention_mask"] = mask[:, :at]
            cache = cache_of(model(piece, **given))
    return view


def atlas_of(name):
    """The page's contents of one sentence through a real model, all heads of it."""
    model, tokenizer = fetched(name)
    given = tokenizer(SENTENCE, return_tensors="pt")
    view = MultiscaleAttentionView()
    with torch.no_grad(), attach(model, record=[view]):
        model(**given)
    tokens = [tokenizer.decode([token]) for token in given["input_ids"][0].tolist()]
    return Atlas(name, tokens, patterns=view.patterns(), neurons=view.neurons())


@pytest.fixture(scope="module")
def pages():
    return {name: (atlas, atlas.page()) for name in ("smollm2", "minilm") for atlas in [atlas_of(name)]}


@pytest.mark.parametrize("name", ["smollm2", "minilm"])
def test_multiscale_attention_view_reads_back_what_was_recorded(pages, name):
    atlas, html = pages[name]
    again = read_back(html)
    assert list(again.tokens) == list(atlas.tokens)
    assert again.neurons.keys() == atlas.neurons.keys() == again.patterns.keys()
    assert len(atlas.neurons) == {"smollm2": 270, "minilm": 72}[name]
    for at, neuron in atlas.neurons.items():
        for field in ("q", "k", "weights"):
            found, expected = getattr(again.neurons[at], field), getattr(neuron, field)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(again.patterns[at].dense(), neuron.weights, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["smollm2", "minilm"])
def test_multiscale_attention_view_products_sum_to_the_score_before_softmax(pages, name):
    """The softmax of the sums, over the keys that a query sees, is the weights that were recorded."""
    atlas, _ = pages[name]
    for neuron in atlas.neurons.values():
        assert neuron.causal == (name == "smollm2")
        products = neuron.q.double()[:, None] * neuron.k.double()
        scores = neuron.scaling * products.sum(dim=-1)
        one, score = neuron.score(5, 3)
        torch.testing.assert_close(one.double(), products[5, 3], rtol=1e-5, atol=1e-6)
        assert score == pytest.approx(scores[5, 3].item(), rel=1e-5, abs=1e-5)
        if neuron.causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        torch.testing.assert_close(scores.softmax(-1).float(), neuron.weights, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["smollm2", "minilm"])
def test_multiscale_attention_view_pages_are_small_and_know_no_address(pages, name):
    html = pages[name][1]
    assert len(html.encode()) < 5e6
    without = html.replace("http://www.w3.org/2000/svg", "")  # a name, which nothing is fetched by
    assert not re.search(r"https?://|<[^>]+ (src|href)=|url\(", without)
    assert "default-src 'none'" in html


@pytest.mark.parametrize("name", ["smollm2", "minilm"])
def test_multiscale_attention_view_pages_open_offline_with_all_three_views(pages, name, tmp_path):
    atlas, _ = pages[name]
    with opened(atlas, tmp_path, "#head=2.1&token=6&view=neurons") as page:
        until(page, "document.querySelectorAll('.neurons tbody tr').length > 5")
        words = page.inner_text("#neuron-value")
        found = re.search(r"Query 6 .*, key (\d+) .*score (-?[\d.]+), weight ([\d.e-]+)", words)
        key, score, weight = int(found[1]), float(found[2]), float(found[3])
        neuron = atlas.neurons[2, 1]
        assert score == pytest.approx(neuron.score(6, key)[1], abs=1e-3)
        assert weight == pytest.approx(neuron.weights[6, key].item(), abs=1e-3)
        assert key == neuron.weights[6].argmax()
        page.click("#tab-lines")
        page.wait_for_selector("svg.lines path", state="attached")
        assert page.locator("#grid td canvas").count() == len(atlas.patterns)  # the model view


def test_multiscale_attention_view_windows_are_cuts_of_the_whole():
    model, ids = small_llama(), prompt(24, 2)
    whole, part = recorded(model, ids).result(), recorded(model, ids, first=5, tokens=9).result()
    cut = slice(5, 14)
    for name in ("q", "k"):
        assert torch.equal(part[name], whole[name][..., cut, :])
    assert torch.equal(part["weights"], whole["weights"][..., cut, cut])


@pytest.mark.parametrize("sizes", [[10, 10, 4], [20, 1, 1, 1, 1], [1, 23]])
def test_multiscale_attention_view_of_pieces_is_one_pass(sizes):
    model, ids = small_llama(), prompt(24, 2)
    whole, view = recorded(model, ids), recorded(model, *ids.split(sizes, dim=1))
    for name, x in whole.result().items():
        torch.testing.assert_close(view.result()[name], x, rtol=1e-5, atol=1e-6)
    assert all(neuron.causal for neuron in view.neurons().values())


def test_multiscale_attention_view_of_chosen_heads_and_grouped_keys():
    model, ids = small_llama(), prompt(24, 2)
    whole, some = recorded(model, ids).neurons(1), recorded(model, ids, heads={2: [0, 3]}).neurons(1)
    assert list(some) == [(2, 0), (2, 3)]
    for at, neuron in some.items():
        assert torch.equal(neuron.k, whole[at].k)
        assert torch.equal(neuron.weights, whole[at].weights)
    assert torch.equal(whole[2, 0].k, whole[2, 1].k)  # two query heads share a key head
    assert not torch.equal(whole[2, 0].k, whole[2, 3].k)


def test_multiscale_attention_view_takes_back_tokens():
    model, ids = small_llama(), prompt(24, 2)
    view, whole = recorded(model, ids), recorded(model, ids[:, :17]).result()
    view.take_back(17)
    for name, x in view.result().items():
        torch.testing.assert_close(x, whole[name])


@pytest.mark.parametrize(("options", "named"), [({"first": -1}, "first"), ({"tokens": 0}, "tokens")])
def test_multiscale_attention_view_refuses_by_name(options, named):
    with pytest.raises(ValueError, match=named):
        MultiscaleAttentionView(**options)


def test_multiscale_attention_view_has_patterns_of_whole_texts_alone():
    view = recorded(small_llama(), prompt(24), first=3)
    with pytest.raises(ValueError, match="begins at 3"):
        view.patterns()
