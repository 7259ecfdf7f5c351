"""Head roles are those of the map of all pairs, whatever caches, padding, heads and parts there are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attlas
import tiny_models
from attlas.attach import Part, attach, blocks
from attlas.contract.families import distinct
from attlas.errors import UserError
from attlas.hf.caches import cache_of, with_cache
from attlas.parts.evict.key_norm import KeyNorm
from attlas.parts.record.head_roles import NAMES, HeadRoles


def of_map(
    weights: Tensor, ids: Tensor | None, valid: Tensor | None = None, sinks: int = 1
) -> dict[str, Tensor]:
    """[layers, batch, heads, tokens] of weights [.., tokens, tokens], by their names."""
    tokens = weights.shape[-1]
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)
    valid = torch.ones(weights.shape[1], tokens, dtype=torch.bool) if valid is None else valid.bool()
    weights = weights * valid[:, None, :, None]
    first = (valid & (valid.long().cumsum(1) <= sinks))[:, None, None]
    found = {
        "entropy": torch.special.entr(weights).sum(-1), "sink": (weights * first).sum(-1),
        "self": (weights * (i == j)).sum(-1), "previous": (weights * (j == i - 1)).sum(-1),
        "distance": (weights * (i - j).abs()).sum(-1), "peak": weights.amax(-1),
    }  # fmt: skip
    if ids is None:
        return found
    ids = ids.masked_fill(~valid, -1)
    none = ids.new_full((len(ids), 1), -1)
    before, coming = torch.cat([none, ids[:, :-1]], 1), torch.cat([ids[:, 1:], none], 1)

    def like(asked: Tensor, there: Tensor) -> Tensor:
        return ((asked[:, :, None] == there[:, None]) & (asked >= 0)[:, :, None])[:, None]

    found["duplicate"] = (weights * (like(ids, ids) & (j < i))).sum(-1)
    found["induction"] = (weights * (like(ids, before) & (j <= i))).sum(-1)
    found["copying"] = (weights * (like(coming, ids) & (j <= i))).sum(-1)
    return found


def means(rows: dict[str, Tensor], valid: Tensor | None = None) -> dict[str, Tensor]:
    """Over valid queries, of `copying` over those with a valid token behind them."""
    found = {}
    for name, each in rows.items():
        there = torch.ones(each.shape[1], each.shape[3]) if valid is None else valid.float()
        if name == "copying":
            there = there * torch.cat([there[:, 1:], torch.zeros(len(there), 1)], 1)
        found[name] = (each * there[:, None]).sum(-1) / there.sum(-1)[:, None].clamp(min=1)
    return found


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        bound = 1e-5 * (30 if name in ("entropy", "distance") else 1)
        value = value.to(found[name].dtype)
        torch.testing.assert_close(found[name], value, atol=bound, rtol=1e-5, msg=name)


def prompt(tokens: int = 24) -> Tensor:
    """Two rows in which tokens come again."""
    torch.manual_seed(3)
    return torch.randint(3, 12, (2, tokens))


@pytest.fixture(params=[blocks.BLOCK, 500], ids=["whole", "blocks"])
def block(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", request.param)


@pytest.mark.parametrize("kind", distinct("rotary", "full", "windows", "soft-caps"))
def test_roles_are_those_of_the_weights(kind: str) -> None:
    model, ids = tiny_models.decoder(kind), prompt()
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    for valid in (None, mask):
        roles, rows = HeadRoles(sinks=3), HeadRoles(sinks=3, rows=True)
        with torch.no_grad(), attach(model, record=["weights", roles, rows]) as session:
            model(ids, attention_mask=valid)
        expected = of_map(session["weights"], ids, valid, 3)
        same(rows.result(), expected)
        same(roles.result(), means(expected, valid))


def test_all_names_are_told_and_agree_with_the_other_recorders() -> None:
    model, ids = tiny_models.decoder("llama"), prompt()
    record = ["entropy", "sink-mass", "mean-distance", HeadRoles(rows=True)]
    with torch.no_grad(), attach(model, record=record) as session:
        model(ids)
    found = session["head-roles"]
    assert list(found) == list(NAMES)
    for ours, theirs in (("entropy", "entropy"), ("sink", "sink-mass"), ("distance", "mean-distance")):
        torch.testing.assert_close(found[ours], session[theirs], atol=1e-5, rtol=1e-5)


def test_encoders_and_pictures_have_roles() -> None:
    model, ids = tiny_models.bert(), prompt()
    mask = torch.ones_like(ids)
    mask[1, 17:] = 0
    with torch.no_grad(), attach(model, record=["weights", HeadRoles(rows=True)]) as session:
        model(ids, attention_mask=mask)
    same(session["head-roles"], of_map(session["weights"], ids, mask))
    model = tiny_models.vit()
    with torch.no_grad(), attach(model, record=["weights", HeadRoles(rows=True)]) as session:
        model(torch.randn(2, 3, 16, 16))
    same(session["head-roles"], of_map(session["weights"], None))


@pytest.mark.parametrize("padded", [False, True])
def test_calls_of_one_sequence_are_one(padded: bool, block: None) -> None:
    model, ids = tiny_models.decoder("llama"), prompt()
    mask = torch.ones_like(ids)
    mask[0, : 5 if padded else 0] = 0
    roles = HeadRoles()
    with torch.no_grad(), attach(model, record=["weights", HeadRoles(rows=True), roles]) as session:
        model(prompt(9).flip(1))  # another sequence, which the next one replaces
        cache = cache_of(model(ids[:, :12], attention_mask=mask[:, :12]))
        for start, stop in ((12, 18), (18, 19), (19, 20), (20, 24)):
            given = with_cache(model, cache)
            model(ids[:, start:stop], attention_mask=mask[:, :stop], **given)
    expected = of_map(session["weights"], ids, mask)
    same(session["head-roles"], expected)
    same(roles.result(), means(expected, mask))


@pytest.mark.parametrize("held", [1, 2**18])
def test_tokens_taken_back_leave_nothing(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attlas.parts.record.head_roles.HELD", held)
    model, ids = tiny_models.decoder("llama"), prompt()
    roles = HeadRoles(rows=True)
    with torch.no_grad(), attach(model, record=["weights", roles]) as session:
        cache = cache_of(model(torch.cat([ids[:, :12], ids[:, 3:5]], dim=1)))
        cache.crop(-2)
        model(ids[:, 12:], **with_cache(model, cache))
    expected = of_map(session["weights"], ids)
    counted = torch.arange(24).ne(23)
    if held == 1:  # the weights of the twelfth are gone when its next token is taken back
        expected["copying"][:, :, :, 11] = 0
        counted[11] = False
    same(roles.result(), expected)
    roles.rows = False
    copied = expected["copying"][..., counted].mean(-1)
    torch.testing.assert_close(roles.result()["copying"], copied)


def test_dropped_tokens_and_changed_weights_are_seen_as_they_are() -> None:
    """A policy's kept keys in their columns, and weights that a part changes, go by blocks of weights."""

    class Sharper(Part):
        def normalize(self, call: Any, weights: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
            return weights.square() / weights.square().sum(-1, keepdim=True)

    model, ids = tiny_models.decoder("llama"), prompt()
    for part in (KeyNorm(0.5, skip_layers=()), Sharper()):
        with (
            torch.no_grad(), attach(model, part, record=["weights", HeadRoles(rows=True)]) as session,
        ):  # fmt: skip
            cache = cache_of(model(ids[:, :20]))
            for at in (20, 21, 22, 23):
                model(ids[:, at : at + 1], **with_cache(model, cache))
        same(session["head-roles"], of_map(session["weights"], ids))


def test_some_layers_and_heads_alone() -> None:
    model, ids = tiny_models.decoder("gpt-oss"), prompt()
    with torch.no_grad(), attach(model, record=["head-roles"]) as session:
        model(ids)
    part = HeadRoles(layers=[1, -1], heads=[3, 0])
    with torch.no_grad(), attach(model, record=[part]):
        model(ids)
    for name, value in session["head-roles"].items():
        last = len(value) - 1
        torch.testing.assert_close(part.result()[name], value[[1, last]][:, :, [3, 0]], msg=name)


def test_heads_are_means_over_all_rows() -> None:
    model, ids = tiny_models.decoder("llama"), prompt()
    mask = torch.ones_like(ids)
    mask[0, :8] = 0
    part = HeadRoles()
    with torch.no_grad(), attach(model, record=[part]):
        model(ids, attention_mask=mask)
    for name, value in part.result().items():
        counts = torch.tensor([15.0, 23.0] if name == "copying" else [16.0, 24.0])
        expected = (value * counts[:, None]).sum(1) / counts.sum()
        torch.testing.assert_close(part.head_scores()[name].values, expected, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_types_are_wide(dtype: torch.dtype) -> None:
    model = tiny_models.decoder("llama").to(dtype)
    part = HeadRoles()
    with torch.no_grad(), attach(model, record=[part]):
        model(prompt())
    wide = torch.promote_types(dtype, torch.float32)
    assert {value.dtype for value in part.result().values()} == {wide}


@pytest.mark.parametrize("name", ["softmax", "differential-transformer", "linear-attention"])
def test_layers_of_ours_have_roles_too(name: str) -> None:
    """Those with a way of their own by their map."""
    torch.manual_seed(0)
    config = attlas.DecoderConfig(
        vocab_size=50, attention=name, hidden_size=32, num_hidden_layers=3, num_attention_heads=4
    )
    model, ids = attlas.Decoder(config).eval(), prompt()
    with torch.no_grad(), attach(model, record=["weights", HeadRoles(rows=True)]) as session:
        model(ids)
    same(session["head-roles"], of_map(session["weights"], ids))


def test_embeddings_have_no_ids() -> None:
    model, ids = tiny_models.decoder("llama"), prompt()
    part = HeadRoles()
    with torch.no_grad(), attach(model, record=[part]):
        model(inputs_embeds=model.get_input_embeddings()(ids))
    assert list(part.result()) == ["entropy", "sink", "self", "previous", "distance", "peak"]


def test_a_prompt_is_seen_without_its_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a long prompt no block of weights is asked for but those of its last token."""
    model, rows = tiny_models.decoder("llama"), []
    inner = blocks.weight_blocks

    def counted(call: Any, *options: Any, **named: Any) -> Any:
        rows.append(call.q.shape[2])
        return inner(call, *options, **named)

    monkeypatch.setattr("attlas.attach.forward.weight_blocks", counted)
    monkeypatch.setattr("attlas.parts.record.head_roles.HELD", 1)
    monkeypatch.setattr("attlas.parts.record.head_roles.HELD", 1)
    monkeypatch.setattr("attlas.parts.record.head_roles.weight_blocks", counted)
    with torch.no_grad(), attach(model, record=["head-roles"]):
        model(prompt(300))
    assert set(rows) == {1}


def test_nothing_recorded_is_told() -> None:
    with pytest.raises(UserError, match="nothing yet"):
        HeadRoles().result()
