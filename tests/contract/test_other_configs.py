"""Adapters on configurations of published programs that no case here has, from their equations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import elu, layer_norm

from attlas.contract.cases import Case, run_case

GROUPS = {"in": "inputs", "param": "params", "mid": "mids", "out": "outs"}


def _passes(name: str, config: dict[str, Any], checks: int, **tensors: Tensor) -> None:
    """A case of tensors called in__x, param__q__weight, ... passes so many comparisons."""
    found: dict[str, dict[str, Tensor]] = {group: {} for group in GROUPS.values()}
    for key, tensor in tensors.items():
        group, _, rest = key.partition("__")
        found[GROUPS[group]][rest.replace("__", ".")] = tensor
    meta = {"config": config, "tolerance": {"atol": 1e-9, "rtol": 1e-9}}
    results = run_case(Case(name, "z", meta, **found))
    assert [r.status for r in results] == ["passed"] * checks, [r.reason for r in results]


def _rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("places", [0, 2])
@pytest.mark.parametrize("norm", ["layer", "none", None])
@pytest.mark.parametrize("kind", ["galerkin", "fourier", "linear"])
def test_galerkin_attention_with_and_without_norms(
    kind: str, norm: str | None, places: int
) -> None:
    dim, heads, n = 12, 3, 7
    width, x, at = dim // heads, _rand(2, n, dim), _rand(2, n, places)
    normed = {"galerkin": "KV", "fourier": "QK", "linear": "KV"}[kind]
    params, found = {}, {}
    for index, name in enumerate("QKV"):
        w, b = params[f"linears__{index}__weight"], params[f"linears__{index}__bias"] = (
            _rand(dim, dim), _rand(dim),
        )  # fmt: skip
        each = (x @ w.T + b).unflatten(-1, (heads, width)).unbind(2)
        if name in normed and norm == "layer":
            for head in range(heads):
                params |= {
                    f"norm_{name}__{head}__{part}": _rand(width) for part in ("weight", "bias")
                }
            each = [
                layer_norm(
                    y, (width,), *(params[f"norm_{name}__{h}__{p}"] for p in ("weight", "bias"))
                )
                for h, y in enumerate(each)
            ]
        found[name] = torch.stack([torch.cat((at, y), -1) for y in each], dim=1)
    q, k, v = found.values()
    if kind == "fourier":
        matrix = q @ k.mT / (width + places) ** 0.5 / n
        out = matrix @ v
    else:
        q, k = (q.softmax(-1), k.softmax(-2)) if kind == "linear" else (q, k)
        matrix = k.mT @ v / n
        out = q @ matrix
    y, more = out.transpose(1, 2).flatten(2), {}
    if places:
        params |= {"fc__weight": _rand(dim, dim + heads * places), "fc__bias": _rand(dim)}
        y, more = y @ params["fc__weight"].T + params["fc__bias"], {"in__pos": at}
    config = {"d_model": dim, "n_head": heads, "attention_type": kind, "pos_dim": places, "norm": norm,
              "norm_eps": 1e-5, "causal": False}  # fmt: skip
    name = {"linear": "galerkin-linear"}.get(kind, kind)
    own = {f"param__{key}": value for key, value in params.items()}
    _passes(name, config, 2, in__x=x, out__y=y, mid__matrix=matrix, **own, **more)


@pytest.mark.parametrize("prenorm", [True, False])
@pytest.mark.parametrize("divided", [True, False])
@pytest.mark.parametrize("kind", ["dpfp", "elu"])
def test_fast_weights_with_and_without_divided_sums(
    kind: str, divided: bool, prenorm: bool
) -> None:
    dim, heads, width, n, nu = 10, 2, 3, 6, 2
    qkvb, out = _rand(heads * (3 * width + 1), dim), _rand(dim, heads * width)
    norm, x = (_rand(dim), _rand(dim)), _rand(n, 2, dim)
    h = layer_norm(x, (dim,), *norm) if prenorm else x
    parts = (h @ qkvb.T).unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
    q, k, v, beta = parts.split([width, width, width, 1], -1)

    def mapped(t: Tensor) -> Tensor:
        if kind == "elu":
            t = elu(t) + 1
        else:
            r = torch.cat((t, -t), -1).relu()
            t = torch.cat([r * r.roll(i, -1) for i in range(1, nu + 1)], -1)
        return t / t.sum(-1, keepdim=True)

    q, k, beta = mapped(q), mapped(k), beta.sigmoid()
    total = k.cumsum(2)
    asked = (total * q).sum(-1, keepdim=True) + 1e-5 if divided else torch.ones_like(beta)
    if divided and kind == "elu":  # that layer divides its keys besides
        kappa = ((total - k) * k).sum(-1, keepdim=True)
        kappa[:, :, 0] = 1.0
        k, beta = k / (kappa + 1e-5), beta * kappa
    state, rows = _rand(2, heads, k.shape[-1], width) * 0, []
    for t in range(n):
        key, value = k[:, :, t, :, None], v[:, :, t, None]
        state = state + beta[:, :, t, None] * key * (value - key.mT @ state)
        rows.append((q[:, :, t, None] @ state)[:, :, 0])
    heads_out = torch.stack(rows, 2) / asked * width**-0.5
    y = h + heads_out.permute(2, 0, 1, 3).flatten(2) @ out.T
    config = {"normalize_attn_scores": divided, "eps": 1e-5, "dropout": 0, "H": heads, "L": n, "B": 2,
              "d_model": dim, "d_head": width, "pre_lnorm": prenorm}  # fmt: skip
    config |= {"n_roll": nu} if kind == "dpfp" else {}
    _passes(
        f"fwp-delta-{kind}", config, 1, in__x=x, param__qkvb_net__weight=qkvb,
        param__o_net__weight=out, param__layer_norm__weight=norm[0],
        param__layer_norm__bias=norm[1],
        out__y=y if prenorm else layer_norm(y, (dim,), *norm),
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["average", "learnable_ratio", "learnable_scale"])
def test_log_normal_attention_mixed_in_every_way(mode: str) -> None:
    heads, n, width = 2, 11, 4
    q, k, v, r, p = (_rand(2, heads, t, width) for t in (n, n, n, 1, 1))
    r, p = r[:1], p[:1]
    a, b = 0.14855178144710912, -0.35487039130661086
    sigma = (((q.std() * k.std()) ** 2 - b) / (2 * a)) ** 0.5
    asked, keys = sigma / q.std() * q, sigma / k.std() * k
    asked = (asked - asked.amax(-1, keepdim=True)).exp()
    weights = asked @ (keys - keys.amax((-2, -1), keepdim=True)).exp().mT
    at = torch.arange(n) // width
    blocks = (q @ k.mT / width**0.5).masked_fill(at[:, None] != at, -torch.inf).softmax(-1) @ v
    lln = weights @ v / (weights.sum(-1, keepdim=True) + 1e-5)
    shares = {"average": (0.5, 0.5), "learnable_ratio": (r, 1 - r), "learnable_scale": (r, p)}[mode]
    # Files hold tensors by name, so that p comes before r.
    own = {"learnable_ratio": {"r": r}, "learnable_scale": {"p": p, "r": r}}.get(mode, {})
    config = {
        "mode": mode,
        "eps": 1e-5,
        "B": 2,
        "H": heads,
        "N": n,
        "D": width,
        "sq": 1.0,
        "sk": 1.0,
    }
    _passes(
        "lln-attention", config, 3, in__q=q, in__k=k, in__v=v, out__lln_full=lln,
        out__lln_plus_diag_full=shares[0] * lln + shares[1] * blocks, mid__diag_full=blocks,
        **{f"param__{name}": share for name, share in own.items()},
    )  # fmt: skip


@pytest.mark.parametrize("values", [5, 9])
def test_lightning_attention_with_values_of_their_own_width(values: int) -> None:
    heads, n, width = 2, 8, 5
    q, k, v = _rand(2, heads, n, width), _rand(2, heads, n, width), _rand(2, heads, n, values)
    slopes = torch.tensor([2.0**-4, 2.0**-8], dtype=torch.float64) * 0.5
    far = torch.arange(n).double()[:, None] - torch.arange(n)
    plain = (q @ k.mT).tril()
    config = {"batch": 2, "heads": heads, "length": n, "head_dim": width, "value_dim": values,
              "slope_factor": 0.5}  # fmt: skip
    kept = torch.exp(-slopes[:, None, None] * far)
    _passes("lightning-attention", config, 3, in__q=q, in__k=k, in__v=v, in__slopes=slopes.float(),
            out__o=(plain * kept) @ v, out__o_no_decay=plain @ v)  # fmt: skip


@pytest.mark.parametrize("told", ["", "memory_visible", "memory_lengths"])
@pytest.mark.parametrize("kind", ["general", "mlp"])
def test_luong_attention_over_a_wider_memory_with_hidden_places(kind: str, told: str) -> None:
    wide, dim, hidden, places = 9, 6, 4, 7
    query, memory, params = _rand(2, 3, dim), _rand(2, places, wide), {}
    if kind == "general":
        params["linear_in"] = _rand(wide, dim)
        scores = query @ params["linear_in"].T @ memory.mT
    else:
        params |= {"linear_query": _rand(hidden, dim), "linear_context": _rand(hidden, wide)}
        params["v"] = _rand(1, hidden)
        both = [t @ params[f"linear_{n}"].T for n, t in (("query", query), ("context", memory))]
        scores = (both[0][:, :, None] + both[1][:, None]).tanh() @ params["v"][0]
    lengths, params["linear_out"] = torch.tensor([places, 4]), _rand(dim, wide + dim)
    shown = torch.arange(places) < lengths[:, None]
    if told:
        scores = scores.masked_fill(~shown[:, None], -torch.inf)
    weights = scores.softmax(-1)
    context = weights @ memory
    y = (torch.cat((query, context), -1) @ params["linear_out"].T).tanh()
    hidden_by = {"memory_visible": shown.to(torch.uint8), "memory_lengths": lengths}
    config = {"src_dim": wide, "tgt_dim": dim, "attn_dim": hidden, "attn_type": kind}
    _passes(
        "luong-general" if kind == "general" else "additive-global", config, 3, in__query=query,
        in__memory=memory, out__y=y, out__weights=weights, mid__context=context,
        **{f"in__{name}": t for name, t in hidden_by.items() if name == told},
        **{f"param__{name}__weight": t for name, t in params.items()},
    )  # fmt: skip


@pytest.mark.parametrize("told", ["memory_visible", "memory_lengths"])
def test_gmm_attention_gives_hidden_places_of_a_memory_next_to_nothing(told: str) -> None:
    dim, hidden, mixtures, places = 5, 4, 3, 9
    query, memory = _rand(2, 4, dim), _rand(2, places, 6)
    sizes = {"0__weight": (hidden, dim), "0__bias": (hidden,), "2__weight": (3 * mixtures, hidden),
             "2__bias": (3 * mixtures,)}  # fmt: skip
    mlp = {name: _rand(*size) / 2 for name, size in sizes.items()}
    inner = (query @ mlp["0__weight"].T + mlp["0__bias"]).tanh()
    share, step, wide = (inner @ mlp["2__weight"].T + mlp["2__bias"]).chunk(3, -1)
    sigma = ((-wide).exp() / 2).sqrt() + 1e-5
    means = step.exp().cumsum(1)
    apart = (torch.arange(places) - means[..., None]) / sigma[..., None]
    weights = (share.exp()[..., None] * (-0.5 * apart.square()).exp()).sum(2)
    lengths = torch.tensor([places, 5])
    shown = torch.arange(places) < lengths[:, None]
    weights = weights.masked_fill(~shown[:, None], 1e-8)
    more = {"memory_visible": shown, "memory_lengths": lengths}[told]
    config = {"query_dim": dim, "hidden": hidden, "components": mixtures, "version": "0"}
    _passes("gmm-location-relative-v0", config, 2, in__query=query, in__memory=memory,
            out__weights=weights, out__context=weights @ memory, **{f"in__{told}": more},
            **{f"param__mlp__{name}": t for name, t in mlp.items()})  # fmt: skip
