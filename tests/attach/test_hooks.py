"""Every stage has a hook that sees a complete call; layers, heads and spans mean one thing."""

import pytest
import torch

import attlas
import tiny_models
from attlas.attach import Part, Recorder, attach, find_span
from attlas.attach.where import Where, in_spans
from attlas.errors import UserError
from attlas.hf.caches import cache_of, with_cache

PROMPT = 24


class Notes(Part):
    """Writes down what each hook can see."""

    def __init__(self):
        self.order, self.seen = [], []

    def note(self, hook, call):
        self.order.append(hook)
        self.seen.append(
            (call.k.shape[2], call.key_positions.clone(), call.original_positions, call.model_mask)
        )

    def position(self, call, q, k):
        self.note("position", call)
        return q, k

    def mask(self, call):
        self.note("mask", call)

    def score_mod(self, call):
        self.note("score_mod", call)

    def normalize(self, call, weights, queries, keys):
        self.note("normalize", call)
        return weights

    def output(self, call, heads):
        self.note("output", call)
        return heads

    def observe(self, call):
        self.note("observe", call)


@pytest.mark.parametrize("kind", ["llama", "mistral-window", "gemma3", "gpt2"])
def test_hooks_follow_the_stages_and_see_a_complete_call(kind):
    model, ids = tiny_models.decoder(kind), tiny_models.prompt(2, PROMPT)
    notes, plain = Notes(), tiny_models.decoder(kind)
    steps = 12  # past the window of 8
    with torch.no_grad(), attach(model, notes):
        cache = cache_of(model(ids, use_cache=True))
        for _ in range(steps):
            out = model(ids[:, :1], **with_cache(model, cache))
    with torch.no_grad():
        cache = cache_of(plain(ids, use_cache=True))
        for _ in range(steps):
            expected = plain(ids[:, :1], **with_cache(plain, cache))
    torch.testing.assert_close(out.logits, expected.logits, atol=1e-4, rtol=1e-4)
    stages = ["position", "mask", "score_mod", "normalize", "output", "observe"]
    assert notes.order[:6] == stages
    last = PROMPT + steps - 1
    for slots, positions, columns, _ in notes.seen[-6 * model.config.num_hidden_layers :]:
        assert positions.shape[-1] == slots
        assert int(positions.max()) == last  # the newest key is the last token, in every layer
        if columns is not None:
            assert int(columns[0, 0, -1]) == last
            assert torch.equal(positions.expand_as(columns), columns)


def test_positions_of_keys_are_those_that_were_given():
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(1, 8)
    notes = Notes()
    with torch.no_grad(), attach(model, notes):
        at = torch.arange(10, 26, 2)[None]
        cache = cache_of(model(ids, position_ids=at, use_cache=True))
        model(ids[:, :1], position_ids=torch.tensor([[40]]), **with_cache(model, cache))
    assert notes.seen[-1][1][0, 0].tolist() == [*range(10, 26, 2), 40]


@pytest.mark.parametrize("rows", [4, 1])
def test_positions_follow_a_batch_whose_rows_are_repeated_or_chosen(rows):
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(2, 8)
    notes = Notes()
    with torch.no_grad(), attach(model, notes):
        at = torch.stack([torch.arange(8), torch.arange(10, 18)])
        cache = cache_of(model(ids, position_ids=at, use_cache=True))
        if rows == 4:
            cache.batch_repeat_interleave(2)
        else:
            cache.batch_select_indices(torch.tensor([1]))
        model(ids[:1, :1].expand(rows, 1), **with_cache(model, cache))
    positions = notes.seen[-1][1]
    expected = [0, 0, 10, 10] if rows == 4 else [0]  # chosen rows: counted from their tokens
    assert positions[:, 0, 0].tolist() == expected


@pytest.mark.parametrize("kind", ["mistral-window", "gemma2", "gemma3", "gpt-oss"])
def test_recorded_weights_of_windows_stand_at_their_tokens(kind):
    """Decoding past the window: columns are those of the text, not slots of the cache."""
    model, ids = tiny_models.decoder(kind, "eager"), tiny_models.prompt(1, 20)
    with torch.no_grad():
        whole = model(ids, output_attentions=True).attentions
        with attach(model, record=["weights"]) as session:
            cache = cache_of(model(ids[:, :6], use_cache=True))
            for at in range(6, 20):
                model(ids[:, at : at + 1], **with_cache(model, cache))
    torch.testing.assert_close(session["weights"], torch.stack(whole), atol=1e-5, rtol=1e-4)


class Double(Part):
    """Twice the weight on a column, renormalised."""

    def normalize(self, call, weights, queries, keys):
        factor = 1.0 + (keys == 3).to(weights.dtype)
        factor = factor if factor.ndim == 1 else factor[:, :, None]
        changed = weights * factor
        return changed / changed.sum(-1, keepdim=True)


def test_normalize_is_a_bias_of_its_logarithm():
    class Bias(Part):
        def score_mod(self, call):
            return lambda s, b, h, q, k: s + 0.6931471805599453 * (k == 3).to(s.dtype)

    model, ids = tiny_models.decoder("llama").double(), tiny_models.prompt()
    logits = {}
    for part in (Double(), Bias()):
        with torch.no_grad(), attach(model, part, record=["weights"]) as session:
            logits[type(part)] = (model(ids).logits, session["weights"])
    for a, b in zip(logits[Double], logits[Bias], strict=True):
        torch.testing.assert_close(a, b)


def test_project_changes_what_is_projected_and_what_is_cached():
    class Zero(Part):
        def __init__(self):
            self.where = Where(layers=[1])

        def project(self, site, x):
            assert (site.layer, site.point) == (1, "project")
            return torch.zeros_like(x)

    model, ids = tiny_models.decoder("llama").double(), tiny_models.prompt()
    with torch.no_grad(), attach(model, Zero()):
        cache = cache_of(model(ids, use_cache=True))
        layers = cache.layers
    assert float(layers[1].values.abs().max()) == 0.0
    assert float(layers[0].values.abs().max()) > 0.0


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt-neox"])
def test_the_stream_is_what_the_model_says_it_is(kind):
    class Stream(Part):
        points = ("residual", "attention", "mlp", "final")

        def __init__(self):
            self.seen = {}

        def stream(self, site, x):
            self.seen[site.point, site.layer] = x.clone()

    model, ids, part = tiny_models.decoder(kind).double(), tiny_models.prompt(), Stream()
    with torch.no_grad(), attach(model, part):
        hidden = model(ids, output_hidden_states=True).hidden_states
    layers = model.config.num_hidden_layers
    for layer in range(layers):
        torch.testing.assert_close(part.seen["residual", layer], hidden[layer])
    if kind != "gpt-neox":  # whose two sublayers stand side by side
        after = part.seen["residual", 0] + part.seen["attention", 0] + part.seen["mlp", 0]
        torch.testing.assert_close(after, part.seen["residual", 1])
    assert ("final", layers - 1) in part.seen


def test_the_stream_can_be_changed_and_a_missing_point_is_refused():
    class Remove(Part):
        points = ("attention",)

        def stream(self, site, x):
            return torch.zeros_like(x)

    model, ids = tiny_models.decoder("llama").double(), tiny_models.prompt()
    plain = model(ids).logits
    with torch.no_grad(), attach(model, Remove()):
        removed = model(ids).logits
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
    torch.testing.assert_close(removed, model(ids).logits)
    assert not torch.allclose(removed, plain)
    with pytest.raises(UserError, match="Remove asks for 'attention', which BertModel cannot give"):
        attach(tiny_models.bert(), Remove()).__enter__()


class Gradients(Recorder):
    """The gradient of each weight, times the weight."""

    wants_gradients = True

    def __init__(self, **where):
        super().__init__(**where)
        self.found = {}

    def update(self, call, weights, queries, keys):
        weights.register_hook(lambda g: self.found.__setitem__(call.layer, (weights.detach(), g)))

    def result(self):
        return {layer: w * g for layer, (w, g) in self.found.items()}


def test_weights_come_with_the_gradients_of_any_scalar():
    model, ids = tiny_models.decoder("llama", "eager").double(), tiny_models.prompt(1, 10)
    out = model(ids, output_attentions=True)
    for weights in out.attentions:
        weights.retain_grad()
    out.logits[0, -1, 5].backward()
    with attach(model, record=[Gradients()]) as session:
        logits = model(ids).logits
        torch.testing.assert_close(
            logits, out.logits, atol=1e-4, rtol=1e-4
        )  # eager rounds its softmax
        logits[0, -1, 5].backward()
        (found,) = (session[name] for name in session.records)
    some = Gradients(layers=[1], heads=[2, 0])
    with attach(model, some):
        model(ids).logits[0, -1, 5].backward()
    torch.testing.assert_close(some.result()[1], found[1][:, [2, 0]])
    for layer, weights in enumerate(out.attentions):
        torch.testing.assert_close(
            found[layer], weights.detach() * weights.grad, atol=1e-5, rtol=1e-3
        )


def test_layers_and_heads_mean_the_same_for_recorders():
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt()
    ways = {
        "layers": {"layers": [0, -1]},
        "heads": {"heads": [3, 1]},
        "by layer": {"heads": {2: [0, 1]}},
    }
    recorders = {name: attlas.make("weights", **options) for name, options in ways.items()}
    with torch.no_grad(), attach(model, record=["weights", *recorders.values()]) as session:
        model(ids)
    whole = session["weights"]
    assert torch.equal(recorders["layers"].result(), whole[[0, 3]])
    assert torch.equal(recorders["heads"].result(), whole[:, :, [3, 1]])
    assert torch.equal(recorders["by layer"].result(), whole[2:3, :, :2])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layers": [4]}, "layer 4; the model has layers 0 to 3"),
        ({"heads": [-5]}, "head -5; the model has heads 0 to 3"),
        ({"heads": {9: [0]}}, "layer 9"),
        ({"layers": [0], "heads": {0: [1]}}, "leave layers out"),
        ({"layers": []}, "names none"),
    ],
)
def test_layers_and_heads_that_are_not_there_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        attach(tiny_models.decoder("llama"), attlas.make("weights", **options)).__enter__()
    with pytest.raises(TypeError, match="layers takes"):
        attlas.make("weights", layers=[1.5])


def test_spans_count_each_rows_own_tokens():
    ranks = torch.tensor([[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]])
    there = torch.tensor([[False, False, True, True, True, True], [True] * 6])
    assert in_spans([(1, 3)], ranks, there).int().tolist() == [
        [0, 0, 0, 1, 1, 0],
        [0, 1, 1, 0, 0, 0],
    ]
    by_row = in_spans([[(0, 1)], [(4, 6), (0, 1)]], ranks, there).int().tolist()
    assert by_row == [[0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 1, 1]]
    for wrong, said in (([(3, 3)], "first < stop"), ([[(0, 1)]] * 3, "3 rows")):
        with pytest.raises(UserError, match=said):
            in_spans(wrong, ranks, there)


class Letters:
    """A tokenizer of two letters a token."""

    def decode(self, ids):
        return "".join("abcdefgh"[2 * i : 2 * i + 2] for i in ids)


def test_a_text_is_found_among_tokens():
    assert find_span(Letters(), [0, 1, 2, 3], "cd") == (1, 2)
    assert find_span(Letters(), torch.tensor([0, 1, 2, 3]), "bcde") == (0, 3)
    for missing in ("xyz", ""):
        with pytest.raises(UserError, match="does not occur"):
            find_span(Letters(), [0, 1], missing)
