"""Position encodings against Transformers, and the invariances that they claim."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.t5.modeling_t5 import T5Attention

from attlas import Attention
from attlas.positions import ALiBi, Learned, Position, RoPE, Sinusoidal, T5Bias, encoding_of


def _config(head_dim: int, **scaling: Any) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, **scaling},
    )  # fmt: skip


@pytest.mark.parametrize("head_dim", [6, 64, 80])
def test_rope_is_that_of_transformers(head_dim: int) -> None:
    rotary = LlamaRotaryEmbedding(_config(head_dim))
    q, k = torch.randn(2, 4, 9, head_dim), torch.randn(2, 2, 9, head_dim)
    positions = torch.arange(9).expand(2, -1) + torch.tensor([[0], [500]])
    wanted = apply_rotary_pos_emb(q, k, *rotary(q, positions))
    rope = RoPE(head_dim)
    torch.testing.assert_close(rope.rotate(q, positions), wanted[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rope.rotate(k, positions), wanted[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("scaling", "theirs"),
    [
        ("linear", {"rope_type": "linear", "factor": 4.0}),
        (
            "yarn",
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
        ),
    ],
)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_scaled_frequencies_are_those_of_transformers(
    scaling: Any, theirs: dict[str, Any], head_dim: int
) -> None:
    frequencies, magnitude = ROPE_INIT_FUNCTIONS[scaling](_config(head_dim, **theirs), "cpu")
    rope = RoPE(head_dim, scaling=scaling, factor=4.0, original_length=2048)
    torch.testing.assert_close(rope.frequencies, frequencies)
    assert rope.magnitude == pytest.approx(magnitude)


def test_ntk_keeps_the_fastest_pair_and_stretches_the_slowest() -> None:
    plain, ntk = RoPE(64).frequencies, RoPE(64, scaling="ntk", factor=8.0).frequencies
    torch.testing.assert_close(ntk[0], plain[0])
    torch.testing.assert_close(ntk[-1], plain[-1] / 8)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_scores_depend_on_distance_alone(interleaved: bool) -> None:
    rope = RoPE(16, interleaved=interleaved).double()
    q, k = torch.randn(2, 1, 2, 9, 16, dtype=torch.float64)
    at = torch.arange(9)
    here = rope.rotate(q, at) @ rope.rotate(k, at).mT
    there = rope.rotate(q, at + 100) @ rope.rotate(k, at + 100).mT
    torch.testing.assert_close(here, there, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        rope.rotate(q, at).norm(dim=-1), q.norm(dim=-1), atol=1e-6, rtol=1e-6
    )


def test_constants_keep_their_precision_whatever_the_layer_is_cast_to() -> None:
    layer = Attention(32, 2, position="rope").to(torch.bfloat16)
    assert torch.equal(layer.position_encoding.frequencies, RoPE(16).frequencies)
    at = torch.tensor([4000])
    x = torch.randn(1, 2, 1, 16).bfloat16()
    wanted = RoPE(16).double().rotate(x.double(), at)
    off = (layer.position_encoding.rotate(x, at).double() - wanted).abs().max()
    assert off < 0.05
    assert torch.equal(ALiBi(12).half().slopes, ALiBi(12).slopes)


def test_rope_with_a_base_for_each_head() -> None:
    rope = RoPE(8, base=[100.0, 10000.0])
    x, at = torch.randn(1, 4, 5, 8), torch.arange(5)
    rotated = rope.rotate(x, at)
    torch.testing.assert_close(rotated[:, :2], RoPE(8, 100.0).rotate(x[:, :2], at))
    torch.testing.assert_close(rotated[:, 2:], RoPE(8, 10000.0).rotate(x[:, 2:], at))
    with pytest.raises(ValueError, match="bases"):
        rope.rotate(torch.randn(1, 3, 5, 8), at)


def test_interleaved_pairs_are_a_permutation_of_the_halves() -> None:
    x, at = torch.randn(1, 1, 5, 8), torch.arange(5)
    order = torch.arange(8).view(2, 4).T.flatten()  # 0 4 1 5 …
    halves = RoPE(8).rotate(x, at)
    torch.testing.assert_close(
        RoPE(8, interleaved=True).rotate(x[..., order], at), halves[..., order]
    )


def test_alibi_slopes() -> None:
    torch.testing.assert_close(ALiBi(8).slopes, 2.0 ** -torch.arange(1.0, 9.0))
    # The first eight of twelve are those of eight, the others every other one of sixteen.
    wanted = torch.cat((2.0 ** -torch.arange(1.0, 9.0), 2.0 ** -(torch.arange(1.0, 8.0, 2) / 2)))
    torch.testing.assert_close(ALiBi(12).slopes, wanted)
    with pytest.raises(ValueError, match="heads"):
        ALiBi(0)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (16, 40)])
def test_t5_buckets_are_those_of_transformers(
    bidirectional: bool, buckets: int, farthest: int
) -> None:
    ours = T5Bias(4, buckets, farthest, bidirectional)
    distance = torch.arange(-300, 301)
    wanted = T5Attention._relative_position_bucket(
        distance, bidirectional=bidirectional, num_buckets=buckets, max_distance=farthest
    )
    assert torch.equal(ours.bucket(distance), wanted)


def test_t5_bias_trains() -> None:
    layer = Attention(16, 2, position="t5")
    layer(torch.randn(1, 300, 16)).sum().backward()  # above the size of one block
    grad = layer.position_encoding.weight.grad
    assert grad is not None
    assert grad.abs().sum() > 0


def test_sinusoids() -> None:
    x = torch.zeros(1, 3, 6)
    added = Sinusoidal(6).embed(x, torch.tensor([0, 1, 50]))
    torch.testing.assert_close(added[0, 0], torch.tensor([0.0, 1, 0, 1, 0, 1]))
    torch.testing.assert_close(added[0, 2, 2], torch.tensor(50 / 10000 ** (2 / 6)).sin())


def test_learned_positions_end() -> None:
    layer = Learned(4, length=8)
    assert layer.embed(torch.zeros(1, 8, 4), torch.arange(8)).shape == (1, 8, 4)
    with pytest.raises(ValueError, match="only 8 are learned"):
        layer.embed(torch.zeros(1, 1, 4), torch.tensor([8]))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: RoPE(7), "head_dim must be even"),
        (lambda: Sinusoidal(7), "dim must be even"),
        (lambda: RoPE(8, scaling="linear", factor=0.5), "factor must be at least 1"),
        (lambda: encoding_of("rpoe", Attention(8, 2)), "did you mean 'rope'"),
    ],
)
def test_wrong_arguments_are_refused_by_name(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


@pytest.mark.parametrize("name", ["none", "learned", "sinusoidal", "rope", "alibi", "t5"])
def test_every_named_position_works_in_a_layer(name: str) -> None:
    assert isinstance(encoding_of(name, Attention(16, 2)), Position)
    layer = Attention(16, 2, position=name, causal=True).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    whole, cache = layer(x), layer.init_cache()
    steps = [layer(x[:, t : t + 1], cache=cache) for t in range(9)]
    torch.testing.assert_close(torch.cat(steps, 1), whole)


def test_a_bias_by_distance_refuses_another_sequence() -> None:
    layer = Attention(16, 2, position="alibi")
    with pytest.raises(ValueError, match="context cannot be given together with position=ALiBi"):
        layer(torch.randn(1, 3, 16), torch.randn(1, 5, 16))


@pytest.mark.parametrize("options", [{}, {"interleaved": True}, {"base": [100.0, 1000.0]}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_and_keys_are_rotated_together_as_each_alone(options, dtype) -> None:
    rope = RoPE(8, **options)
    q, k, at = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8, dtype=dtype), torch.arange(3, 8)
    for k_at in (at, at.clone(), at[None].expand(2, -1)):
        together = rope.rotate_both(q, k, at, k_at)
        assert torch.equal(together[0], rope.rotate(q, at))
        assert torch.equal(together[1], rope.rotate(k, k_at))
