"""Adapters of the cache policies and recorders to published implementations' numbers."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from attlas.attach.call import Call, Step
from attlas.attach.session import attach
from attlas.cache.policy import CachePolicy, best
from attlas.contract.cases import Case, Check, adapter
from attlas.hf.caches import cache_of, with_cache
from attlas.parts.evict.ada_kv import AdaKV
from attlas.parts.evict.expected_attention import ExpectedAttention
from attlas.parts.evict.key_norm import KeyNorm
from attlas.parts.evict.observed_attention import ObservedAttention
from attlas.parts.evict.pyramid_kv import PyramidKV, pyramid
from attlas.parts.evict.snapkv import SnapKV
from attlas.parts.evict.tova import TOVA
from attlas.parts.evict.window import SinksWindow
from attlas.parts.record.column_sums import ColumnSums
from attlas.storage.layer import LayerState, StoredLayer
from attlas.storage.rotary import Rotary


def key_norm(config: dict[str, Any]) -> KeyNorm:
    return KeyNorm(1.0 - config["compression_ratio"], skip_layers=())


def snapkv(config: dict[str, Any]) -> SnapKV:
    return SnapKV(
        1.0 - config["compression_ratio"],
        window=config["window_size"],
        kernel=config["kernel_size"],
    )


def expected_attention(config: dict[str, Any]) -> ExpectedAttention:
    return ExpectedAttention(
        1.0 - config["compression_ratio"],
        n_future=config["n_future_positions"],
        sinks=config["n_sink"],
        epsilon=float(config.get("epsilon", 0.0)),
        use_covariance=config.get("use_covariance", True),
        use_vnorm=config.get("use_vnorm", True),
    )


def window(config: dict[str, Any]) -> SinksWindow:
    return SinksWindow(1.0 - config["compression_ratio"], sinks=config["n_sink"])


def rerotated(config: dict[str, Any]) -> SinksWindow:
    return SinksWindow(1.0 - config["compression_ratio"], sinks=config["n_sink"], rerotate=True)


def everything(config: dict[str, Any]) -> SinksWindow:
    """A budget of the whole context changes nothing."""
    return SinksWindow(1.0 - config["compression_ratio"])


def tova(config: dict[str, Any]) -> TOVA:
    return TOVA(1.0 - config["compression_ratio"])


def observed(config: dict[str, Any]) -> ObservedAttention:
    return ObservedAttention(1.0 - config["compression_ratio"])


class UnevenPyramid(PyramidKV):
    """Rounds each layer from a mean that may be no whole number, as published code does."""

    def budgets(self, state: LayerState, slots: Any) -> Tensor:
        place = state.layer, len(state.full)
        share = self.budget.keep or 0.0
        means = [(Fraction(real * share), real) for real in slots.real.tolist()]
        return torch.tensor([pyramid(*m, self.floor[1], self.beta, *place) for m in means])


def pyramid_kv(config: dict[str, Any]) -> PyramidKV:
    options = {"window": config["window_size"], "kernel": config["kernel_size"]}
    return UnevenPyramid(
        1.0 - config["compression_ratio"], scorer_options=options, beta=float(config["beta"])
    )


def ada_kv(config: dict[str, Any]) -> AdaKV:
    options = {"window": config["window_size"], "kernel": config["kernel_size"]}
    return AdaKV(
        1.0 - config["compression_ratio"],
        scorer_options=options,
        alpha=float(config["alpha_safeguard"]),
    )


POLICIES = {
    "knorm": ("key-norm-eviction", key_norm),
    "snapkv": ("snapkv", snapkv),
    "expected-attention": ("expected-attention", expected_attention),
    "expected-attention-mean": ("expected-attention", expected_attention),
    "streaming": ("window", window),
    "streaming-llm": ("window", window),
    "streaming-llm-rerotated": ("window", rerotated),
    "full-cache": ("window", everything),
    "tova": ("tova", tova),
    "observed": ("observed-attention", observed),
    "observed-attention": ("observed-attention", observed),
    "pyramidkv": ("pyramid-kv", pyramid_kv),
    "adakv-snapkv": ("ada-kv", ada_kv),
}


def kept_otherwise(case: Case, name: str, ours: Tensor, theirs: Tensor, scores: Tensor) -> Check:
    """How many tokens are kept by one side alone, near-ties aside.

    Scores agree within the case's tolerance alone, so tokens whose published score lies that near to
    the last one kept may be chosen either way.
    """
    ours, theirs = (
        torch.zeros_like(scores, dtype=torch.bool).scatter(-1, kept.long(), True)
        for kept in (ours, theirs)
    )
    edge = scores.masked_fill(~theirs, torch.inf).amin(dim=-1, keepdim=True)
    near = (scores - edge).abs() <= 2 * (case.atol + case.rtol * edge.abs())
    return Check(
        f"{name}: tokens kept by one side alone", float(((ours != theirs) & ~near).sum()), 0.0
    )


def run_layer(
    policy: CachePolicy, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary | None = None
) -> tuple[Tensor, Tensor]:
    """(scores, kept columns) of a prompt's queries, keys and values."""
    state = LayerState(0, (0,), rotary=rotary, scaling=q.shape[-1] ** -0.5)
    layer = StoredLayer({policy.name: state})
    layer.update(k, v)
    step = Step(length=q.shape[2])
    call = Call(0, nn.Identity(), q, k, v, state.scaling, None, step, is_causal=True)
    policy.learn(state, call)
    slots = policy.slots(layer, state, layer.rows())
    scores = policy.scores(state, slots)
    return scores, best(scores, slots.valid, slots.budget)[0]


def press(case: Case) -> Iterator[Check]:
    """One attention layer: scores and kept positions."""
    config = case.config
    policy = POLICIES[case.name.removeprefix("press-")][1](config)
    keys = case.inputs["k_rope"]
    batch, _, tokens, dim = keys.shape
    rotary = Rotary.plain(dim, float(config["rope_theta"]))
    queries = case.inputs.get("q_pre_rope", torch.zeros(batch, config["heads"], tokens, dim))
    queries = rotary.rotate(queries, torch.arange(tokens).expand(batch, -1))
    scores, kept = run_layer(policy, queries, keys, case.inputs.get("v", keys), rotary)
    yield case.compare("out.scores", scores)
    yield kept_otherwise(case, "out.kept", kept, case.outs["kept"], case.outs["scores"])


@adapter("l2-norm", mechanism="key-norm-eviction")
def l2_norm(case: Case) -> Iterator[Check]:
    """Kept pairs in order of norm; ours are in order of position."""
    keys, values = case.inputs["k"], case.inputs["v"]
    count = case.outs["k"].shape[2]
    policy = KeyNorm(tokens=count, skip_layers=())
    scores, kept = run_layer(policy, torch.zeros_like(keys), keys, values)
    order = scores.gather(-1, kept).argsort(dim=-1, descending=True)
    at = kept.gather(-1, order)[..., None].expand(-1, -1, -1, keys.shape[-1])
    yield case.compare("out.k", keys.gather(2, at))
    yield case.compare("out.v", values.gather(2, at))


@adapter("snapkv", mechanism="snapkv")
def snapkv_cluster(case: Case) -> Iterator[Check]:
    """The prefix pairs in order of falling score, then the window; ours are in order of position."""
    config = case.config
    queries, keys, values = (case.inputs[name] for name in "qkv")
    recent = config["window_size"]
    policy = SnapKV(
        tokens=config["max_capacity_prompt"],
        window=recent,
        kernel=config["kernel_size"],
        pooling=config["pooling"].removesuffix("pool"),
    )
    scores, kept = run_layer(policy, queries, keys, values)
    window = torch.arange(keys.shape[2] - recent, keys.shape[2]).expand(*kept.shape[:2], -1)
    prefix = kept[..., :-recent].long()
    if "kept_prefix_indices" in case.mids:
        order = scores.gather(-1, prefix).argsort(dim=-1, descending=True)
        prefix = prefix.gather(-1, order)
        theirs = case.mids["kept_prefix_indices"].long()
        # Pooling makes equal scores (max pooling many): of these either may be taken, in any order.
        ours_at, theirs_at = scores.gather(-1, prefix), scores.gather(-1, theirs)
        equal = (ours_at - theirs_at).abs() <= case.atol + case.rtol * theirs_at.abs()
        prefix = torch.where(equal, theirs, prefix)
        yield case.compare("mid.kept_prefix_indices", prefix)
    at = torch.cat([prefix, window], dim=-1)[..., None].expand(-1, -1, -1, keys.shape[-1])
    yield case.compare("out.k", keys.gather(2, at))
    yield case.compare("out.v", values.gather(2, at))


@cache
def smollm2() -> Any:
    from attlas.models.load import load

    return load("smollm2")


def answer(
    case: Case, nudge: float = 0.0
) -> tuple[dict[int, Tensor], Tensor, dict[int, Any], Tensor, list[int]]:
    """(scores, kept per layer, columns kept, first logits, generated ids) of our policy.

    With a nudge, equal scores are decided for the later token, or the earlier if it is negative.
    """
    policy = POLICIES[case.name.removeprefix("model-")][1](case.config)
    scores: dict[int, Tensor] = {}
    score = policy.scores

    def spy(state: LayerState, slots: Any) -> Tensor:
        scores[state.layer] = score(state, slots)
        at = torch.linspace(0, 1, slots.rank.shape[-1])
        return scores[state.layer] + nudge * scores[state.layer].abs() * at

    policy.scores = spy  # type: ignore[method-assign]
    model = smollm2()
    ids = case.inputs["context_ids"].long()[None]
    question = case.inputs["question_ids"].long()[None]
    with attach(model, policy) as session:
        cache = cache_of(model(ids, use_cache=True, logits_to_keep=1))
        layers = session.cache.layers
        held = torch.tensor([slots_held(layer) for layer in layers])
        kept = {number: layers[number].columns() for number in scores}
        out = model(question, **with_cache(model, cache), logits_to_keep=1).logits[0, -1]
        first, generated = out, []
        for _ in case.outs["generated_ids"]:
            generated.append(int(out.argmax()))
            out = model(torch.tensor([generated[-1:]]), **with_cache(model, cache)).logits[0, -1]
    return scores, held, kept, first, generated


def slots_held(layer: Any) -> int:
    """Slots of a layer, on average over its heads."""
    columns = layer.columns()
    if columns is None:
        return int(layer.keys.shape[2])
    return int((columns >= 0).sum()) // int(columns[..., 0].numel())


def removed_otherwise(case: Case, number: int, kept: Tensor, alpha: float) -> Iterator[Check]:
    """Against a published mask of what is hidden, head by head, for one layer of one row.

    Scores near the last one kept of the layer, or of a head that keeps no more than what it is sure
    of, may be taken either way.
    """
    scores = case.outs[f"scores.layer{number}"]
    theirs = case.outs[f"removed_mask.layer{number}"] == 0
    ours = torch.zeros(len(scores), scores.shape[-1] + 1, dtype=torch.bool)
    ours = ours.scatter(-1, torch.where(kept >= 0, kept, -1).long() % ours.shape[-1], True)[:, :-1]
    share = int(theirs.sum()) // len(scores)
    safe = theirs.sum(dim=-1, keepdim=True) <= int(alpha * share)
    edge = scores.masked_fill(~theirs, torch.inf).amin(dim=-1, keepdim=True)
    edge = torch.where(safe, edge, scores.masked_fill(theirs, -torch.inf).max())
    near = (scores - edge).abs() <= 2 * (case.atol + case.rtol * edge.abs())
    name = f"out.removed_mask.layer{number}"
    yield Check(f"{name}: removed otherwise", float(((ours != theirs) & ~near).sum()), 0.0)
    yield Check(f"{name}: slots held", float((ours.sum() - theirs.sum()).abs()), 0.0)


def on_model(case: Case) -> Iterator[Check]:
    """Prefill, compression, a question and greedy decoding on the real language model."""
    scores, held, kept, first, generated = answer(case)
    for number in case.config["layers_saved"] if scores else ():
        theirs = case.outs[f"scores.layer{number}"]
        yield case.compare(f"out.scores.layer{number}", scores[number][0])
        if f"removed_mask.layer{number}" in case.outs:
            alpha = case.config["alpha_safeguard"]
            yield from removed_otherwise(case, number, kept[number][0], alpha)
            continue
        label = f"kept.layer{number}"
        yield kept_otherwise(case, f"out.{label}", kept[number][0], case.outs[label], theirs)
    if not any(name.startswith("removed_mask") for name in case.outs):
        yield case.compare("out.kept_per_layer", held)  # what is hidden counts as held there
    top = case.outs["first_logits_top10_ids"].long()
    logits = case.compare("out.first_logits_top10", first[top])
    # Which of two keys of one norm stays is decided by rounding; the logits may be either's.
    for nudge in (1e-5, -1e-5) if logits.error > logits.bound and scores else ():
        other = case.compare("out.first_logits_top10", answer(case, nudge)[3][top])
        logits = min(logits, other, key=lambda check: check.error / check.bound)
    yield logits
    wrong = sum(a != b for a, b in zip(generated, case.outs["generated_ids"].tolist(), strict=True))
    yield Check("out.generated_ids: tokens that differ", float(wrong), 0.0)


PRESSES = ("knorm", "snapkv", "expected-attention", "expected-attention-mean", "streaming", "tova",
           "observed")  # fmt: skip
for case_name in PRESSES:
    adapter(f"press-{case_name}", mechanism=POLICIES[case_name][0])(press)
for case_name in POLICIES.keys() - {"streaming", "observed"}:
    adapter(f"model-{case_name}", mechanism=POLICIES[case_name][0])(on_model)


@adapter("attention-sink-metric", mechanism="column-sums")
def sink_metric(case: Case) -> Iterator[Check]:
    """Published weights [samples, layers, heads, tokens, tokens] through the recorder."""
    weights = case.inputs["attention"]
    recorder = ColumnSums()
    tokens = weights.shape[-1]
    empty = torch.zeros(weights.shape[0], weights.shape[2], tokens, 1)
    for layer in range(weights.shape[1]):
        call = Call(layer, nn.Identity(), empty, empty, empty, 1.0, None, Step(length=tokens))
        recorder.update(call, weights[:, layer], torch.arange(tokens), torch.arange(tokens))
    yield case.compare("mid.importance", recorder.importance().transpose(0, 1))
    yield case.compare("out.metric", recorder.sink_metric(float(case.config["epsilon"])))
    exceeds = recorder.importance()[..., 0] > case.config["epsilon"]
    yield case.compare("out.metric_per_head", exceeds.float().mean(dim=1))
