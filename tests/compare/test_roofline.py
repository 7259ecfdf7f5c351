"""The roofline of decoding: what each layer does for a byte, and the command that shows it."""

from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

from attlas.compare.intensity import experts, grouped, latent
from attlas.compare.roofline import roofline
from attlas.errors import UserError

app = typer.Typer()
app.command()(roofline)


def test_mla_arithmetic_intensity_is_two_orders_above_multi_head() -> None:
    """128 heads, latent 512, rotary 64, 16 bits: 242 FLOP/byte where multi-head attention has 1."""
    mla = latent(heads=128, latent=512, rotary=64, length=4096)
    mha = grouped(heads=128, kv_heads=128, head_dim=128, length=4096)
    assert mla.intensity == pytest.approx(241.8, abs=0.1)
    assert mha.intensity == pytest.approx(1.0)
    assert mla.intensity / mha.intensity > 100


@pytest.mark.parametrize("batch", [1, 64])
def test_grouped_attention_gains_its_group_whatever_the_batch(batch: int) -> None:
    for kv_heads in (1, 4, 32):
        work = grouped(heads=32, kv_heads=kv_heads, head_dim=128, length=512, batch=batch)
        assert work.intensity == pytest.approx(32 / kv_heads)


def test_latent_attention_counts_what_its_layer_does() -> None:
    """The absorbed layer's two products, and the numbers that its cache holds."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import attlas

    layer = attlas.make("mla", dim=32, heads=4, latent=12, rotary=6, causal=True)
    cache = layer.init_cache()
    layer(torch.randn(1, 10, 32), cache=cache)
    q, k, v, inputs = layer.prepare(torch.randn(1, 1, 32), cache=cache)
    up_and_down = 2 * 4 * 12 * (layer.head_dim + layer.value_dim)
    with FlopCounterMode(display=False) as counter:
        layer.attend(q, k, v, inputs)
    wanted = latent(heads=4, latent=12, rotary=6, length=11, dtype_bytes=4)
    assert counter.get_total_flops() - up_and_down == wanted.flops
    assert cache.layers[0].keys.nbytes == wanted.bytes


def test_experts_are_read_once_however_many_tokens_take_them() -> None:
    few, many = (experts(experts=64, active=4, dim=8, width=16, batch=b) for b in (1, 100_000))
    assert few.bytes == 4 * 3 * 8 * 16 * 2
    assert few.intensity == pytest.approx(1.0)
    assert many.bytes == pytest.approx(64 * 3 * 8 * 16 * 2)
    assert many.intensity == pytest.approx(100_000 * 4 / 64)


def test_roofline_command_shows_every_layer() -> None:
    shown = CliRunner().invoke(app, ["--batch", "1", "--ridge", "200"])
    assert shown.exit_code == 0, shown.output
    lines = {w[1]: w for w in (line.split() for line in shown.output.splitlines()) if len(w) > 6}
    assert {"MHA", "GQA", "MQA", "MLA", "MoE"} <= set(lines)
    assert "241.8" in lines["MLA"]
    assert "compute" in lines["MLA"]
    assert "memory" in lines["MHA"]


@pytest.mark.parametrize(
    ("option", "value", "name"),
    [("--heads", "0", "heads"), ("--kv-heads", "7", "kv_heads"), ("--latent", "-1", "latent"),
     ("--rotary", "-1", "rotary"), ("--batch", "0", "batch"), ("--ridge", "0", "ridge"),
     ("--ridge", "nan", "ridge"), ("--active", "999", "active"), ("--length", "0", "length"),
     ("--dtype-bytes", "0", "dtype_bytes")],
)  # fmt: skip
def test_roofline_command_refuses_by_name(option: str, value: str, name: str) -> None:
    refused = CliRunner().invoke(app, [option, value])
    assert isinstance(refused.exception, UserError)
    assert str(refused.exception).startswith(name)


def test_roofline_command_shows_the_tiles_of_a_neighbourhood() -> None:
    """Perfectly block-sparse: what is visited is what is visible, 24 × 48 of 64 × 64 keys."""
    asked = ["--neighborhood", "64x64", "--window", "24x48", "--stride", "8x16"]
    shown = CliRunner().invoke(app, [*asked, "--q-tile", "8x16", "--kv-tile", "8x8"])
    assert shown.exit_code == 0, shown.output
    words = shown.output.split()
    assert {"8×16", "8×8", "28.12%", "0.0%", "3.56"} <= set(words)
    best = CliRunner().invoke(app, ["--neighborhood", "4096", "--window", "512", "--causal", "1"])
    assert best.exit_code == 0, best.output
    assert "4096:512/1c" in best.output
    assert "128" in best.output


@pytest.mark.parametrize(
    ("given", "name"),
    [({"--window": ""}, "window is needed"), ({"--window": "ax3"}, "window takes whole"),
     ({"--stride": "3x3x3"}, "stride takes one number, or 2"), ({"--window": "99"}, "window="),
     ({"--q-tile": "8x8"}, "q-tile and kv-tile"), ({"--causal": "yes"}, "causal takes"),
     ({"--neighborhood": "4x4x4x4", "--window": "2"}, "shape takes")],
)  # fmt: skip
def test_roofline_command_refuses_neighbourhoods_by_name(given: dict[str, str], name: str) -> None:
    asked = {"--neighborhood": "16x16", "--window": "3x3", **given}
    refused = CliRunner().invoke(app, [word for pair in asked.items() for word in pair])
    assert isinstance(refused.exception, UserError)
    assert str(refused.exception).startswith(name)
