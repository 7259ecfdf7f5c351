"""GUI-KV: images as spans or ids, hidden states as the attention is given them, repeats pruned first."""

import pytest
import torch
from torch import nn

import tiny_models
from attlas.attach import Call, ForwardPass, Part, attach
from attlas.cache.policy import best_slots
from attlas.cache.prompt import prefill
from attlas.errors import UserError
from attlas.parts.evict.gui_kv import GuiKV
from attlas.parts.evict.snapkv import SnapKV
from attlas.storage.layer import LayerState, StoredLayer

IMAGES = ((3, 11), (13, 19), (22, 30))
TOKENS = 38
OPTIONS = {"window": 4, "alpha": 0.5, "temperature": 2.0, "rank": 3}


def make(**options):
    return GuiKV(0.4, **{"images": IMAGES, **OPTIONS, **options})


def screens(model, rows=1):
    """Embeddings of a text in which random screenshots stand."""
    embeds = model.get_input_embeddings()(tiny_models.prompt(rows, TOKENS)).detach().clone()
    for start, stop in IMAGES:
        embeds[:, start:stop] = torch.randn(rows, stop - start, 64)
    return embeds


def columns_after(model, policy, chunk=None, **inputs):
    with torch.no_grad(), attach(model, policy) as session:
        model(use_cache=True, **inputs)
        return [layer.original_positions() for layer in session.cache.layers]


def by_hand(q, k, hidden, budget, scaling):
    """Columns kept of one row and key head, straight from the definition."""
    tokens, window = k.shape[0], OPTIONS["window"]
    rows = []
    for query in q:  # the heads of the group
        logits = query[-window:] @ k.T * scaling
        later = torch.arange(tokens) > torch.arange(tokens - window, tokens)[:, None]
        summed = logits.masked_fill(later, -torch.inf).softmax(-1).sum(0)[: tokens - window]
        around = nn.functional.pad(summed, (2, 2)).unfold(0, 5, 1)
        rows.append(around.mean(-1))
    scores = torch.stack(rows).mean(0)
    start, stop = IMAGES[-1]
    norms = hidden[start:stop].norm(dim=-1)
    standard = (norms - norms.mean()) / norms.std()
    scores[start:stop] += OPTIONS["alpha"] * (standard / OPTIONS["temperature"]).softmax(0)
    old = torch.cat([torch.arange(*span) for span in IMAGES[:-1]])
    basis = torch.linalg.qr(k[start:stop].T).Q[:, : OPTIONS["rank"]]
    residual = (k[old] - k[old] @ basis @ basis.T).norm(dim=-1)
    count = int((1 - budget / tokens) * len(old))
    scores[old[residual.argsort()[:count]]] = 0
    prefix = scores.topk(budget - window).indices.sort().values
    return [*prefix.tolist(), *range(tokens - window, tokens)]


class Look(Part):
    """Remembers each layer's call."""

    def __init__(self):
        self.calls = {}

    def observe(self, call):
        self.calls[call.layer] = call


def test_gui_kv_is_its_definition_on_a_model():
    model = tiny_models.decoder("llama")
    embeds = screens(model, rows=2)
    look = Look()
    with torch.no_grad(), attach(model, look):
        states = model(inputs_embeds=embeds, output_hidden_states=True).hidden_states
    kept = columns_after(model, make(), inputs_embeds=embeds)
    for number, call in look.calls.items():
        given = model.model.layers[number].input_layernorm(states[number])
        for row in range(2):
            for head in range(2):
                expected = by_hand(
                    call.q[row, 2 * head : 2 * head + 2], call.k[row, head], given[row],
                    int(TOKENS * 0.4), call.scaling,
                )  # fmt: skip
                assert kept[number][row, head].tolist() == expected


def test_both_terms_change_what_is_kept():
    model = tiny_models.decoder("llama")
    embeds = screens(model)
    whole = columns_after(model, make(alpha=4.0), inputs_embeds=embeds)
    same = {"kernel": 5, "pooling": "avg"}
    plain = columns_after(model, SnapKV(0.4, window=4, **same), inputs_embeds=embeds)
    unshown = columns_after(model, make(images=()), inputs_embeds=embeds)
    one = columns_after(model, make(images=IMAGES[-1:], alpha=4.0), inputs_embeds=embeds)
    assert all(torch.equal(a, b) for a, b in zip(plain, unshown, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(plain, one, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, whole, strict=True))
    last = [[((c >= 22) & (c < 30)).sum() for c in found] for found in (one, plain)]
    assert sum(last[0]) > sum(last[1])


def test_gui_kv_drops_an_exact_repeat_before_the_current_screen():
    """The repeat goes entirely, and before anything of the current one, though it is read as much."""
    torch.manual_seed(0)
    tokens, dim = 60, 32
    q, k, v = (torch.randn(1, 2, tokens, dim) for _ in range(3))
    images = ((2, 18), (20, 28), (30, 38))  # a screen of its own, then one that is shown again
    k[:, :, 20:28] = k[:, :, 30:38]
    k[:, :, 2:18] += 2  # far from the current one's span
    policy = GuiKV(tokens=36, images=images, window=8, kernel=1)
    state = LayerState(0, (0,), scaling=dim**-0.5)
    layer, module = StoredLayer({policy.name: state}), nn.Identity()
    layer.update(k, v)
    step = ForwardPass(length=tokens, hidden={module: torch.randn(1, tokens, 24)})
    policy.learn(state, Call(0, module, q, k, v, state.scaling, None, step, is_causal=True))
    slots = policy.slots(layer, state, layer.rows())
    scores = policy.scores(state, slots)[0]
    assert int((1 - 36 / 60) * 24) == 9  # of the earlier screens' tokens are taken the score
    assert (scores[:, 20:28] == 0).all()
    assert (scores[:, 30:38] > 0).all()
    for head in best_slots(scores[None], slots.valid, slots.budget)[0][0].tolist():
        assert not set(head) & set(range(20, 28))


@pytest.mark.parametrize("side", ["left", "right"])
def test_spans_count_tokens_not_columns(side):
    model = tiny_models.decoder("llama")
    embeds, other = screens(model), screens(model)
    gap = torch.randn(1, 6, 64)
    parts = [gap, embeds] if side == "left" else [embeds, gap]
    both = torch.cat([torch.cat(parts, dim=1), torch.cat([other, other[:, -6:]], dim=1)])
    mask = torch.ones(2, TOKENS + 6, dtype=torch.long)
    mask[0, slice(0, 6) if side == "left" else slice(-6, None)] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    alone = columns_after(model, make(), inputs_embeds=embeds)
    padded = columns_after(
        model, make(), inputs_embeds=both, attention_mask=mask, position_ids=positions
    )
    for one, two in zip(alone, padded, strict=True):
        kept = [[c for c in head if c >= 0] for head in two[0].tolist()]
        assert kept == (one[0] + (6 if side == "left" else 0)).tolist()


def test_ids_spans_chunks_and_forks_agree():
    model = tiny_models.decoder("llama")
    ids = tiny_models.prompt(2, TOKENS)
    ids[ids == 96] = 5
    for start, stop in IMAGES:
        ids[:, start:stop] = 96
    spans, tokens = make(rank=2), make(rank=2, images=None, image_token=96)
    expected = columns_after(model, spans, input_ids=ids)
    assert all(
        torch.equal(a, b)
        for a, b in zip(expected, columns_after(model, tokens, input_ids=ids), strict=True)
    )
    prompt = prefill(model, ids, [spans, tokens], chunk=9)
    for policy in (spans, tokens):
        forked = [layer.original_positions() for layer in prompt.fork(policy).layers]
        assert all(torch.equal(a, b) for a, b in zip(expected, forked, strict=True))


def test_rows_may_show_other_images():
    model = tiny_models.decoder("llama")
    ids = tiny_models.prompt(2, TOKENS)
    ids[ids == 96] = 5
    ids[0, 3:11], ids[0, 22:30], ids[1, 15:25] = 96, 96, 96
    policy = make(images=None, image_token=96)
    both = columns_after(model, policy, input_ids=ids)
    for row in range(2):
        alone = columns_after(model, policy, input_ids=ids[row : row + 1])
        assert all(torch.equal(a[row], b[0]) for a, b in zip(both, alone, strict=True))


def test_hidden_states_are_watched_only_when_wanted():
    model, ids = tiny_models.decoder("gpt2"), tiny_models.prompt(1, 12)

    class Wants(Look):
        wants_hidden = True

    watched = []  # beside what attaching itself needs
    for part, seen in ((Look(), False), (Wants(), True)):
        with torch.no_grad(), attach(model, part):
            states = model(ids, output_hidden_states=True).hidden_states
            watched.append(sum(len(m._forward_pre_hooks) for m in model.modules()))
        assert not any(m._forward_pre_hooks for m in model.modules())
        call = part.calls[3]  # the last layer's is what the step still holds
        if not seen:
            assert call.hidden is None
            continue
        torch.testing.assert_close(call.hidden, model.transformer.h[3].ln_1(states[3]))
        assert part.calls[0].hidden is None
    assert torch.equal(call.forward_pass.ids, ids)
    assert watched[1] == watched[0] + 4  # one a layer


def test_defaults_are_those_of_the_published_evaluation():
    policy = GuiKV(0.2, images=())
    assert (policy.alpha, policy.temperature, policy.window) == (2.0, 3.5, 8)
    assert (policy.kernel, policy.pooling, policy.rank) == (5, "avg", 32)


def test_refusals():
    for options in ({}, {"images": IMAGES, "image_token": 3}):
        with pytest.raises(UserError, match="images"):
            GuiKV(0.5, **options)
    for images in (((3, 3),), ((5, 9), (8, 12)), ((-1, 4),)):
        with pytest.raises(UserError, match="spans"):
            GuiKV(0.5, images=images)
    for name, value in (("temperature", 0.0), ("rank", 0)):
        with pytest.raises(UserError, match=name):
            make(**{name: value})
    model = tiny_models.decoder("llama")
    with pytest.raises(UserError, match="images end at token 30"), attach(model, make()):
        model(tiny_models.prompt(1, 25))
    policy = make(images=None, image_token=5)
    with pytest.raises(UserError, match="needs input_ids"), attach(model, policy):
        model(inputs_embeds=torch.randn(1, 25, 64))
