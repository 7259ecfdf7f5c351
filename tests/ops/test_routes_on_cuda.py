"""The compiled routes on a GPU: each within twice the plain computation's error against float64."""

import jaxtyping
import pytest
import torch

import attlas
from attlas import masks, ops
from attlas.ops import backends
from attlas.positions import ALiBi, T5Bias

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def untyped():
    """Shapes checked at run time are nothing that the compiler can trace."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


PATTERNS = {
    "causal": masks.causal,
    "window": masks.causal & (masks.window(200) | masks.sinks(4)),
    "dilated": masks.causal & masks.dilated(64, 4),
    "documents": masks.causal & masks.document(torch.arange(1500) // 400),
    "bigbird": masks.bigbird(1536, heads=4, size=64),
}


def inputs(queries: int, keys: int, dtype: torch.dtype, kv_heads: int = 2) -> list[torch.Tensor]:
    torch.manual_seed(0)
    make = {"device": "cuda", "dtype": dtype}
    return [
        torch.randn(2, 4, queries, 64, **make).requires_grad_(),
        torch.randn(2, kv_heads, keys, 64, **make).requires_grad_(),
        torch.randn(2, kv_heads, keys, 64, **make).requires_grad_(),
    ]


def judged(run, plain, exact) -> None:
    """Outputs and gradients of `run` are at most twice as far from `exact` as those of `plain`."""
    for ours, same_precision, truth in zip(run, plain, exact, strict=True):
        allowed = 2 * (same_precision.double() - truth).abs().max() + 1e-6
        assert (ours.double() - truth).abs().max() <= allowed


def with_gradients(out: torch.Tensor, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    torch.manual_seed(7)
    direction = torch.randn(out.shape, device=out.device, dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad(out, tensors, direction)]


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_patterns_through_auto(name, dtype):
    length = 1536 if name == "bigbird" else 1500
    tensors, mask = inputs(length, length, dtype), PATTERNS[name]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    judged(
        with_gradients(ops.attend(*tensors, mask=mask), tensors),
        with_gradients(ops.attend(*tensors, mask=mask, route="reference"), tensors),
        with_gradients(ops.attend(*exact, mask=mask, route="reference"), exact),
    )


@pytest.mark.parametrize("length", [1500, 2048])
@pytest.mark.parametrize(
    "bias", [ALiBi(4), T5Bias(4), attlas.make("bam", dim=8, heads=4).position_encoding],
    ids=["alibi", "t5", "bam"],
)
def test_score_mods_through_auto(bias, length):
    bias = bias.cuda()
    trained = list(bias.parameters())
    tensors = inputs(length, length, torch.bfloat16)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    options = {"mask": masks.causal, "score_mod": bias.score_mod}
    judged(
        with_gradients(ops.attend(*tensors, **options), tensors + trained),
        with_gradients(ops.attend(*tensors, **options, route="reference"), tensors + trained),
        with_gradients(ops.attend(*exact, **options, route="reference"), exact + trained),
    )


@pytest.mark.parametrize("route", ["flex", "chunked"])
def test_lse_and_merge(route):
    q, k, v = inputs(1300, 1300, torch.float32)
    with torch.no_grad():
        parts = [
            ops.attend(q, k[:, :, a:b], v[:, :, a:b], return_lse=True, route=route, q_offset=0)
            for a, b in ((0, 500), (500, 1300))
        ]
        merged, _ = ops.merge(parts)
        torch.testing.assert_close(merged, ops.attend(q, k, v), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("width", [16, 32, 64, 128])
@pytest.mark.parametrize("length", [64, 128, 192, 320])
@pytest.mark.parametrize("masked", [False, True])
def test_short_texts_through_auto(width, length, masked):
    """As a small model trains: heads that are views of token-first projections, in bfloat16."""
    make = {"device": "cuda", "dtype": torch.bfloat16}
    tensors = [
        torch.randn(8, length, 4, width, **make).transpose(1, 2).requires_grad_() for _ in range(3)
    ]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    mask = masks.causal
    if masked:
        mask = masks.dense(mask, length, length, device="cuda")
        starts = torch.arange(8, device="cuda")[:, None, None, None]  # padding on the left
        mask = mask & (torch.arange(length, device="cuda") >= starts)
    judged(
        with_gradients(ops.attend(*tensors, mask=mask), tensors),
        with_gradients(ops.attend(*tensors, mask=mask, route="reference"), tensors),
        with_gradients(ops.attend(*exact, mask=mask, route="reference"), exact),
    )


@pytest.mark.parametrize(("queries", "keys"), [(704, 704), (1, 128)])
def test_gradients_of_rows_whose_scores_are_all_low(queries, keys):
    """Every score near -120, as massive activations make them: cuDNN's gradients are NaN here."""
    torch.manual_seed(0)
    make = {"device": "cuda", "dtype": torch.bfloat16}
    q, k, v = (0.1 * torch.randn(1, 2, n, 64, **make) for n in (queries, keys, keys))
    q[..., 0], k[..., 0] = 1.0, -960.0
    tensors = [x.requires_grad_() for x in (q, k, v)]
    mask = torch.ones(1, 1, queries, keys, dtype=torch.bool, device="cuda").tril(keys - queries)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    ours = with_gradients(ops.attend(*tensors, mask=mask), tensors)
    assert all(x.isfinite().all() for x in ours)
    judged(
        ours,
        with_gradients(ops.attend(*tensors, mask=mask, route="reference"), tensors),
        with_gradients(ops.attend(*exact, mask=mask, route="reference"), exact),
    )


@pytest.mark.parametrize("values", ["tokens first", "heads first"])
def test_gradients_in_any_layout_after_any_other(values):
    """What SDPA was asked before, and in which layout, changes no gradient: cuDNN's plans are kept."""
    make = {"device": "cuda", "dtype": torch.bfloat16}
    q, k, v = (torch.randn(4, 4, 168, 64, **make) for _ in range(3))
    v = v.transpose(1, 2).contiguous().transpose(1, 2) if values == "tokens first" else v
    tensors = [x.requires_grad_() for x in (q, k, v)]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    head_first = torch.randn(4, 4, 168, 64, **make)
    token_first = head_first.transpose(1, 2).contiguous().transpose(1, 2)

    def gradients(out, tensors, direction):
        return torch.autograd.grad(out, tensors, direction.to(out.dtype))

    plain = torch.nn.functional.scaled_dot_product_attention
    gradients(plain(*tensors, is_causal=True), tensors, head_first)  # what keeps a plan of its layout
    truth = gradients(ops.attend(*exact, mask=masks.causal, route="reference"), exact, head_first)
    near = gradients(ops.attend(*tensors, mask=masks.causal, route="reference"), tensors, head_first)
    for direction in (token_first, head_first, token_first):
        for name in (backends.DEFAULT, "cudnn"):
            out = backends._called(name, *tensors, {"is_causal": True}, True)
            judged(gradients(out, tensors, direction), near, truth)
    judged(gradients(ops.attend(*tensors, mask=masks.causal), tensors, token_first), near, truth)
