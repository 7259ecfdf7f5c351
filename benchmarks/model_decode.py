"""A random-weight model of Llama-8B's shape decoding behind a long context, cache by cache.

Reading 128k tokens eight times over takes minutes a method and says nothing of decoding, so the caches
are filled with random keys and values, and every method then does with them what it does at the end of
a prompt. Tokens per second are medians over steps of the whole model, greedy, in eager mode; peak
memory is that of the steps, weights included. Methods take turns, each with a cache of its own.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from attlas.attach import Call
from attlas.attach.call import ForwardPass
from attlas.attach.session import bytes_read, cache_bytes
from attlas.compare.methods import parse_method
from attlas.compare.shared import attached
from attlas.hf.caches import DynamicLayer, with_cache
from attlas.storage.layer import StoredLayer
from common import save, show, stepped

WINDOW = 64
METHODS = (
    "full",
    "snapkv(keep=0.125)",
    "quest-page-selection(keep=0.125, page=32)",
    "quantized-cache(bits=4)",
    "quantized-cache(bits=2)",
)


def shaped(layers: int, device: str, small: bool) -> Any:
    """Llama-3-8B's shape with so many layers, in bfloat16."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 512} if small else {
        "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256,
    }  # fmt: skip
    heads = {"num_attention_heads": 4 if small else 32, "num_key_value_heads": 2 if small else 8}
    config = LlamaConfig(
        **sizes, **heads, num_hidden_layers=layers, max_position_embeddings=2**18,
        rope_theta=500000.0, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device=device)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    rotary = model.model.rotary_emb
    fresh = type(rotary)(config=config).to(device)
    model.model.rotary_emb = fresh
    return model.eval()


def filled(model: Any, parts: tuple[Any, ...], batch: int, tokens: int) -> DynamicCache:
    """A cache of random keys and values, in the type of the model, compressed as at a prompt's end."""
    config = model.config
    cache = DynamicCache(config=config)
    for part in parts:
        cache.layers = part.cache_layers(cache.layers, model)
    width = config.hidden_size // config.num_attention_heads
    held = (batch, config.num_key_value_heads, tokens, width)
    asked = (batch, config.num_attention_heads, WINDOW, width)
    for number, layer in enumerate(cache.layers):
        k, v = (torch.randn(held, dtype=model.dtype, device=model.device) for _ in range(2))
        layer.update(k, v)
        queries = torch.randn(asked, dtype=model.dtype, device=model.device)
        seen = ForwardPass(cache=cache, offset=tokens - WINDOW, length=WINDOW)
        module = model.model.layers[number].self_attn
        call = Call(number, module, queries, k, v, width**-0.5, None, seen, cache_layer=layer)
        del k, v
        for part in parts:
            state = layer.learned[part.name]
            state.scaling = call.scaling
            part.learn(state, call)
        call.k = call.v = queries  # let go of the whole keys
        for part in parts:
            part.compress(layer, layer.learned[part.name], layer.rows())
        if parts:
            layer.compressed = True
    return cache


def quantized(model: Any, batch: int, tokens: int, bits: int) -> Any:
    """Transformers' own QuantizedCache (Quanto), filled likewise."""
    from transformers import QuantizedCache

    cache = QuantizedCache("quanto", model.config, nbits=bits)
    config = model.config
    width = config.hidden_size // config.num_attention_heads
    for number in range(config.num_hidden_layers):
        k, v = (
            torch.randn(batch, config.num_key_value_heads, tokens, width, dtype=torch.bfloat16,
                        device=model.device) for _ in range(2)
        )  # fmt: skip
        cache.update(k, v, number)
        del k, v
    return cache


def measured(
    model: Any, make: Callable[[], Any], parts: tuple[Any, ...], batch: int, steps: int
) -> dict[str, Any]:
    """Tokens per second and memory of one method."""
    cuda = model.device.type == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        weights = torch.cuda.memory_allocated()
    cache = make()
    gc.collect()
    found: dict[str, Any] = {}
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        found["cache_gib"] = (torch.cuda.memory_allocated() - weights) / 2**30
        torch.cuda.reset_peak_memory_stats()
    ids = torch.ones(batch, 1, dtype=torch.long, device=model.device)

    def step() -> None:
        nonlocal ids
        ids = model(ids, **with_cache(model, cache), use_cache=True).logits[:, -1:].argmax(-1)

    with torch.no_grad(), attached(model, parts):
        ms = statistics.median(stepped(step, steps + 3, model.device)[3:])
    found |= {"step_ms": ms, "tokens_per_s": 1e3 * batch / ms}
    if cuda:
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if isinstance(cache.layers[0], StoredLayer) or type(cache.layers[0]) is DynamicLayer:
        found |= {"promised_gib": cache_bytes(cache) / 2**30, "read_gib": bytes_read(cache) / 2**30}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cells", nargs="+", default=["32:8:32768", "12:8:131072", "32:1:131072"],
                        help="layers:batch:tokens")  # fmt: skip
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--quanto", type=int, nargs="*", default=[4])
    parser.add_argument("--small", action="store_true", help="tiny widths, to try the script")
    options = parser.parse_args()
    rows = []
    for cell in options.cells:
        layers, batch, tokens = map(int, cell.split(":"))
        model = shaped(layers, options.device, options.small)
        candidates: dict[str, Any] = dict.fromkeys(options.methods)
        candidates |= {f"QuantizedCache(nbits={bits})": bits for bits in options.quanto}
        first: dict[str, Any] | None = None
        for name, bits in candidates.items():
            row = {"method": name, "layers": layers, "batch": batch, "tokens": tokens}
            try:
                parts = parse_method(name).parts() if bits is None else ()
                make = (
                    partial(filled, model, parts, batch, tokens)
                    if bits is None
                    else partial(quantized, model, batch, tokens, bits)
                )
                row |= measured(model, make, parts, batch, options.steps)
                if name == "full":
                    first = row
                elif first is not None:
                    row["speedup"] = first["step_ms"] / row["step_ms"]
            except Exception as error:  # one method's failure is a row, not the end
                row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
            rows.append(show(row))
        del model
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
    save("model-decode", options.device, rows)


if __name__ == "__main__":
    main()
