"""Reference cases: ours pass, those never seen pass, and damaged ones fail with a reason."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from attlas.contract.cases import (
    Case,
    adapter,
    adapters,
    checkout_cases,
    compare,
    load_cases,
    run_case,
)
from attlas.contract.result import Result
from attlas.errors import UserError

CASES = checkout_cases()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_published_numbers(case: Case) -> None:
    results = run_case(case)
    assert results
    for result in results:
        if " is not here; run `attlas fetch minilm`" in result.reason:
            pytest.skip("the case is of MiniLM, which was not fetched")
        assert result.status == "passed", f"{result.check}: {result.reason}"


def test_golden_cases_have_descriptions_and_adapters() -> None:
    known = adapters()
    for case in CASES:
        assert case.name in known
        assert {"title", "config", "computes", "tolerance"} <= set(case.meta)


# Configurations that no published case here has, computed from the equations in a few lines ---------


def _write(root: Path, name: str, config: dict[str, Any], stem: str = "z9", **tensors: Tensor) -> Case:
    folder = root / name
    folder.mkdir(parents=True)
    meta = {"config": config, "tolerance": {"atol": 1e-9, "rtol": 1e-9}}
    (folder / f"{stem}.json").write_text(json.dumps(meta))
    named = {key.replace("__", "."): value.contiguous() for key, value in tensors.items()}
    save_file(named, folder / f"{stem}.safetensors")
    (case,) = load_cases(root)
    return case


def _passes(case: Case, checks: int) -> None:
    results = run_case(case)
    assert [r.status for r in results] == ["passed"] * checks, [r.reason for r in results]


def _rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def _causal(scores: Tensor) -> Tensor:
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -torch.inf)


@pytest.mark.parametrize("causal", [False, True])
def test_multi_query_of_other_sizes(tmp_path: Path, causal: bool) -> None:
    dim, heads, width = 12, 3, 5
    p = {"q": _rand(heads * width, dim), "k": _rand(width, dim), "v": _rand(width, dim)}
    out, bias, x = _rand(dim, heads * width), _rand(dim), _rand(3, 7, dim)
    scores = _heads(x @ p["q"].T, heads) @ (x @ p["k"].T)[:, None].mT / width**0.5
    weights = (_causal(scores) if causal else scores).softmax(-1)
    y = _joined(weights @ (x @ p["v"].T)[:, None]) @ out.T + bias
    config = {"embed_dim": dim, "num_heads": heads, "head_dim": width, "causal": causal, "bias": False}
    weights = {f"param__{n}_proj__weight": w for n, w in p.items()}
    case = _write(tmp_path, "multi-query", config, in__x=x, out__y=y, **weights,
                  param__out_proj__weight=out, param__out_proj__bias=bias)  # fmt: skip
    _passes(case, 1)


@pytest.mark.parametrize(("cross", "bias"), [(True, True), (False, True), (True, False)])
def test_qk_norm_across_sequences(tmp_path: Path, cross: bool, bias: bool) -> None:
    dim, heads = 12, 3
    stacked, biases, g = _rand(4 * dim, dim), _rand(4 * dim) * bias, torch.tensor(3.3).double()
    x, context = _rand(2, 5, dim), _rand(2, 8, dim)
    keys = context if cross else x
    hidden = torch.zeros(2, keys.shape[1], dtype=torch.uint8)
    hidden[1, -2:] = 1
    w, b = stacked.chunk(4), biases.chunk(4)
    q, k, v = (
        _heads(t @ w[i].T + b[i], heads) for i, t in enumerate((x, keys, keys))
    )  # fmt: skip
    q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    scores = (g * q @ k.mT).masked_fill(hidden[:, None, None].bool(), -torch.inf)
    map_ = scores.softmax(-1)
    y = _joined(map_ @ v) @ w[3].T + b[3]
    config = {"embed_dim": dim, "num_heads": heads, "bias": bias, "seq_len_threshold": 9,
              "causal": False, "cross": cross}  # fmt: skip
    more = {"in__context": context} if cross else {}
    more |= {"param__biases": biases} if bias else {}
    case = _write(tmp_path, "qk-norm", config, in__x=x, in__key_padding=hidden, out__y=y,
                  mid__weights=map_, param__weights=stacked, param__mha_scale__scale=g,
                  **more)  # fmt: skip
    _passes(case, 2)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


@pytest.mark.parametrize(("kv_heads", "causal"), [(2, True), (1, True), (4, False)])
def test_differential_with_grouped_keys(tmp_path: Path, kv_heads: int, causal: bool) -> None:
    heads, width, depth, length = 4, 4, 2, 9
    dim, repeats = heads * width * 2, heads // kv_heads
    wq, wo = _rand(dim, dim) / 5, _rand(dim, dim)
    wk, wv = _rand(dim // repeats, dim) / 5, _rand(dim // repeats, dim)
    lam = {name: _rand(width) / 3 for name in ("q1", "k1", "q2", "k2")}
    norm, x = _rand(2 * width), _rand(2, length, dim)
    # In float32 first, as positions are: cosines of float64 angles would be others.
    angles = torch.arange(length).float()[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
    cos, sin = angles.cos().double(), angles.sin().double()
    q = _turned(_heads(x @ wq.T, 2 * heads), cos, sin)
    k = _turned(_heads(x @ wk.T, 2 * kv_heads), cos, sin).repeat_interleave(repeats, 1)
    v = _heads(x @ wv.T, kv_heads).repeat_interleave(repeats, 1)
    scores = q @ k.mT / width**0.5
    maps = (_causal(scores) if causal else scores).softmax(-1).unflatten(1, (heads, 2))
    initial = 0.8 - 0.6 * math.exp(-0.3 * depth)
    full = (lam["q1"] @ lam["k1"]).exp() - (lam["q2"] @ lam["k2"]).exp() + initial
    each = (maps[:, :, 0] - full * maps[:, :, 1]) @ v
    normed = each / (each.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm
    y = _joined(normed * (1 - initial)) @ wo.T
    config = {"embed_dim": dim, "depth": depth, "num_heads": heads, "num_kv_heads": kv_heads,
              "head_dim": width, "causal": causal, "rope": "interleaved pairs, base 10000"}  # fmt: skip
    case = _write(
        tmp_path, "differential", config, in__x=x, in__cos=cos, in__sin=sin, out__y=y,
        mid__heads_before_norm=each, mid__lambda_full=full[None], param__subln__weight=norm,
        param__q_proj__weight=wq, param__k_proj__weight=wk, param__v_proj__weight=wv,
        param__out_proj__weight=wo, **{f"param__lambda_{n}": t for n, t in lam.items()},
    )  # fmt: skip
    case.meta["tolerance"] = {"atol": 1e-6, "rtol": 1e-6}
    _passes(case, 5)


@pytest.mark.parametrize(("half_steps", "epsilon"), [(1, 1.0), (4, 0.7), (9, 1.0)])
def test_sinkformer_of_other_steps(tmp_path: Path, half_steps: int, epsilon: float) -> None:
    dim, heads, width, n = 10, 3, 4, 6
    qkv, out, bias, x = _rand(3 * heads * width, dim), _rand(dim, 12), _rand(dim), _rand(2, n, dim)
    q, k, v = (_heads(t, heads) for t in (x @ qkv.T).chunk(3, -1))
    s = q @ k.mT / width**0.5
    rows, columns = torch.zeros(2, heads, n, 1).double(), torch.zeros(2, heads, 1, n).double()
    for step in range(half_steps):
        total = (s + rows + columns) / epsilon
        if step % 2:
            columns = epsilon * (-math.log(n) - total.logsumexp(-2, keepdim=True)) + columns
        else:
            rows = epsilon * (-math.log(n) - total.logsumexp(-1, keepdim=True)) + rows
    plan = n * ((s + rows + columns) / epsilon).exp()
    config = {"dim": dim, "heads": heads, "dim_head": width, "max_iter": half_steps,
              "eps": epsilon, "causal": False}  # fmt: skip
    case = _write(tmp_path, "sinkformer", config, in__x=x, mid__weights=plan,
                  out__y=_joined(plan @ v) @ out.T + bias, param__to_qkv__weight=qkv,
                  param__to_out__0__weight=out, param__to_out__0__bias=bias)  # fmt: skip
    _passes(case, 2)


@pytest.mark.parametrize("undivided", [False, True])
@pytest.mark.parametrize("gates", ["keys", "separate_gate_keys", "value_gates"])
def test_cope_with_every_gate(tmp_path: Path, gates: str, undivided: bool) -> None:
    width, npos, n = 6, 5, 7
    q, k, v, k_gate = (_rand(3, n, width) for _ in range(4))
    embedding, mask = _rand(1, width, npos), torch.ones(n, n).double().tril().expand(3, n, n)
    read = {"keys": k, "separate_gate_keys": k_gate, "value_gates": v}[gates]
    gate = (q @ read.mT / width**0.5).sigmoid() * mask
    place = gate.flip(-1).cumsum(-1).flip(-1).clamp(max=npos - 1)
    z = q @ embedding[0]
    low, high = place.floor().long(), place.ceil().long()
    bias = z.gather(-1, low) * (1 - (place - low)) + z.gather(-1, high) * (place - low)
    scores = q @ k.mT / width**0.5 + (bias if undivided else bias / width**0.5)
    weights = scores.masked_fill(mask == 0, -torch.inf).softmax(-1)
    config = {"head_dim": width, "npos_max": npos, "separate_gate_keys": gates == "separate_gate_keys",
              "value_gates": gates == "value_gates", "position_logits_undivided": undivided}  # fmt: skip
    case = _write(tmp_path, "cope", config, in__q=q, in__k=k, in__v=v, in__k_gate=k_gate,
                  in__mask=mask, mid__weights=weights, out__y=weights @ v,
                  param__pos_emb=embedding)  # fmt: skip
    _passes(case, 2)


@pytest.mark.parametrize(("masked", "biased"), [(False, False), (True, False), (False, True)])
def test_memory_efficient_without_mask_or_bias(tmp_path: Path, masked: bool, biased: bool) -> None:
    q, k, v, bias = _rand(2, 3, 5, 4), _rand(2, 3, 9, 4), _rand(2, 3, 9, 6), _rand(2, 3, 5, 9)
    mask = (torch.rand(2, 3, 5, 9) > 0.3).to(torch.uint8)
    mask[..., 0] = 1
    scores = q @ k.mT / 2 + bias * biased
    scores = scores.masked_fill(mask == 0, -torch.inf) if masked else scores
    more = ({"in__mask": mask} if masked else {}) | ({"in__bias": bias} if biased else {})
    config = {"query_chunk_size": 2, "key_chunk_size": 4}
    case = _write(tmp_path, "memory-efficient", config, in__q=q, in__k=k, in__v=v,
                  out__o=scores.softmax(-1) @ v, **more)  # fmt: skip
    _passes(case, 1)


# What can be wrong with a folder of cases ----------------------------------------------------------


def _case_files(folder: Path, config: str = '{"config": {}}') -> Path:
    folder.mkdir(parents=True)
    (folder / "a.json").write_text(config)
    save_file({"in.x": torch.ones(2), "out.y": torch.ones(2)}, folder / "a.safetensors")
    return folder


def _only(root: Path) -> Result:
    (case,) = load_cases(root)
    (result,) = run_case(case)
    return result


def test_a_case_without_adapter_is_listed(tmp_path: Path) -> None:
    _case_files(tmp_path / "never-heard-of")
    assert _only(tmp_path).status == "no adapter"
    assert _only(tmp_path).name == "never-heard-of"


def test_damaged_and_missing_tensors_fail_with_a_reason(tmp_path: Path) -> None:
    folder = _case_files(tmp_path / "qk-norm")
    (folder / "a.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0no json")
    assert "a.safetensors is damaged" in _only(tmp_path).reason
    (folder / "a.safetensors").unlink()
    assert "a.safetensors is missing beside a.json" in _only(tmp_path).reason
    for text in ("{", "[]", '{"config": 3}', "\udcff"):
        (folder / "a.json").write_bytes(text.encode(errors="surrogateescape"))
        result = _only(tmp_path)
        assert result.status == "failed"
        assert "a.json cannot be read" in result.reason


def test_a_case_of_another_shape_or_config_fails_with_a_reason(tmp_path: Path) -> None:
    _case_files(tmp_path / "qk-norm")
    result = _only(tmp_path)
    assert result.status == "failed"
    assert "embed_dim" in result.reason


def test_folders_without_cases_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a folder"):
        load_cases(tmp_path / "none")
    with pytest.raises(UserError, match="holds no reference cases"):
        load_cases(tmp_path)
    _case_files(tmp_path / "cope")
    assert [case.label for case in load_cases(tmp_path / "cope")] == ["cope/a"]


def test_cases_of_papers_are_found_in_their_folders(tmp_path: Path) -> None:
    _case_files(tmp_path / "a-paper" / "golden" / "cope")
    _case_files(tmp_path / "b-paper" / "golden" / "qk-norm")
    (tmp_path / "b-paper" / "pins.json").write_text('{"qk-norm": 31}')
    assert [case.label for case in load_cases(tmp_path)] == ["cope/a", "qk-norm/a"]
    assert [case.label for case in load_cases(tmp_path / "b-paper")] == ["qk-norm/a"]


def test_a_folder_of_cases_has_one_adapter() -> None:
    adapters()
    with pytest.raises(ValueError, match=r"'cope' have an adapter already, in .*contextual-position"):
        adapter("cope", mechanism="softmax")(lambda case: [])


def test_error_and_bound_are_those_of_the_worst_element() -> None:
    theirs = torch.tensor([100.0, 1.0, 0.0])
    ours = torch.tensor([100.4, 1.1, 0.0])
    check = compare("out.y", ours, theirs, atol=0.1, rtol=0.01)
    assert check.error == pytest.approx(0.1, rel=1e-3)
    assert check.bound == pytest.approx(0.11)
    assert compare("y", torch.ones(2), torch.ones(3), 1.0, 1.0).error == math.inf
    assert compare("y", torch.tensor([math.nan]), torch.ones(1), 1.0, 1.0).error == math.inf
    nan_too = torch.tensor([math.nan, -math.inf])
    assert compare("y", nan_too, nan_too.clone(), 1e-5, 0.0).error == 0
    assert compare("y", torch.ones(1), torch.tensor([math.inf]), 1e-5, 1.0).error == math.inf


def test_an_adapter_that_compares_nothing_fails(tmp_path: Path) -> None:
    adapter("compares-nothing", mechanism="softmax")(lambda case: [])
    _case_files(tmp_path / "compares-nothing")
    assert "compared nothing" in _only(tmp_path).reason


def test_a_line_is_json_without_infinities() -> None:
    line = Result("a", "b", "c", math.inf, 1e-5, "failed", "λ off").line()
    assert json.loads(line) == {
        "name": "a", "case": "b", "check": "c", "error": None, "bound": 1e-5, "status": "failed",
        "reason": "λ off",
    }  # fmt: skip
