"""Decoding behind a long context: a decoder with a recurrent state beside one with softmax attention.

Both are random decoders of 1.1 billion parameters in bfloat16, one token at a time. The recurrent one has
read the context; the softmax one's cache is filled with random keys and values of as many tokens, which
costs a step the same, and has met every length before: cuDNN plans each new one, for 40 ms. Alternately
in pairs; both with captured steps, and both as they run without.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import DynamicCache

import attlas
from attlas.attach import attach
from attlas.attach.session import cache_bytes
from attlas.hf.caches import cache_of, with_cache
from common import paired_ratio, save, show

CONTEXTS = (1024, 2048, 32768, 131072)
SHAPE = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 16,
}  # fmt: skip
#: Key heads of the softmax decoder, as models of this size have them.
KV_HEADS = 4
#: Tokens that the recurrent decoder reads at a time.
READ = 8192


def decoder(mechanism: str, device: str, shape: dict[str, int], **options: int) -> Any:
    """A random decoder."""
    config = attlas.DecoderConfig(
        **shape, **options, attention=mechanism, max_position_embeddings=2 * max(CONTEXTS)
    )
    with torch.device(device):
        return attlas.Decoder(config).to(torch.bfloat16).eval()


def filled(model: Any, tokens: int) -> DynamicCache:
    """A cache of random keys and values."""
    config, cache = model.config, DynamicCache()
    width = config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        shape = (1, config.num_key_value_heads, tokens, width)
        cache.update(*torch.randn(2, *shape, device=model.device, dtype=model.dtype), layer)
    return cache


def read(model: Any, tokens: int) -> Any:
    """A cache behind that many random tokens."""
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=model.device)
    cache = None
    for part in ids.split(READ, dim=1):
        given = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        cache = cache_of(model(part, **given))
    return cache


@torch.no_grad()
def compared(model: Any, softmax: Any, tokens: int, args: Any, compile: Any) -> dict[str, Any]:
    """A step of both behind so many tokens."""
    state, keys = read(model, tokens), filled(softmax, tokens)
    row: dict[str, Any] = {"state_bytes": cache_bytes(state), "softmax_bytes": cache_bytes(keys)}
    token = torch.zeros(1, 1, dtype=torch.long, device=args.device)

    def steps(net: Any, cache: Any) -> None:
        for _ in range(args.steps):
            net(token, **with_cache(net, cache), use_cache=True)

    with attach(model, compile=compile) as ours, attach(softmax, compile=compile) as theirs:
        if not compile:
            for _ in range(args.rounds + 1):
                steps(softmax, keys)
            keys = filled(softmax, tokens)
        timed = paired_ratio(
            lambda: steps(model, state), lambda: steps(softmax, keys),
            rounds=args.rounds, device=args.device, queued=1,
        )  # fmt: skip
    row |= {"why_not_captured": [ours.why_not_captured, theirs.why_not_captured]}
    read_here = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    row["weight_bytes"] = read_here
    for who, ms in (("ours", timed["ours_ms"]), ("softmax", timed["theirs_ms"])):
        row |= {f"{who}_step_ms": ms / args.steps, f"{who}_tokens_s": 1e3 * args.steps / ms}
    return row | {"ratio": timed["ratio"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--mechanisms", nargs="+", default=["lightning-attention-2"])
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=16, help="tokens of a timed call")
    parser.add_argument("--compile", nargs="+", default=["auto", "True", "False"], help="of attach")
    parser.add_argument("--small", action="store_true", help="a model to try this file with")
    args = parser.parse_args()
    shape = {**SHAPE, "hidden_size": 64, "num_hidden_layers": 2} if args.small else SHAPE
    rows: list[dict[str, object]] = []
    softmax = decoder("softmax", args.device, shape, num_key_value_heads=KV_HEADS)
    for name in args.mechanisms:
        model = decoder(name, args.device, shape)
        for tokens in args.contexts:
            for word in args.compile:
                compile = {"True": True, "False": False}.get(word, word)
                row = {"mechanism": name, "context": tokens, "compile": compile}
                rows.append(show(row | compared(model, softmax, tokens, args, compile)))
                save("decode-recurrent", args.device, rows)
        del model


if __name__ == "__main__":
    main()
