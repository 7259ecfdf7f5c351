"""What a type checker must say of options; `make types` reads this file, and nothing runs it.

An error that is no error any more is told as an unused ignore, so each line below is a test.
"""

from attlas import Attention
from attlas.layers.weights.differential import Differential
from attlas.parts.evict.snapkv import SnapKV

layer = Attention(64, 4, kv_heads=2, position="rope", causal=True)
width: int = layer.head_dim
shared: int = layer.kv_heads
Differential(64, depth=3, pairing="repeated")
SnapKV(0.5, window=16, pooling="max")

Attention(64, haeds=4)  # type: ignore[call-arg]
Attention("64")  # type: ignore[arg-type]
Differential(64, pairing="repaeted")  # type: ignore[arg-type]
SnapKV(0.5, windwo=16)  # type: ignore[call-arg]
SnapKV(0.5, pooling="mean")  # type: ignore[arg-type]
