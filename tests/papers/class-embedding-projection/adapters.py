"""Adapter of the lens in class space to published numbers."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attlas.analyses.class_embedding_projection import (
    ClassEmbeddingProjection,
    by_gradients,
    passed,
    projected,
    ranks,
)  # fmt: skip
from attlas.contract.cases import Case, Check, adapter
from attlas.inspect.readout import readout
from attlas.inspect.subject import Subject

#: Published names of a block's weights, and ours.
NAMES = {
    "norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
}  # fmt: skip


@adapter("vit-class-embedding-space", mechanism="class-embedding-projection")
def lens(case: Case) -> Iterator[Check]:
    """A small ViT on given tokens: ranks and logits of what passes, memories, the map by gradients."""
    from transformers import ViTConfig, ViTForImageClassification

    config, params, x = case.config, case.params, case.inputs["x"]
    case.sizes(x, "B tokens dim")
    case.without_effect("config.seed")
    model = ViTForImageClassification(ViTConfig(
        hidden_size=x.shape[-1], num_hidden_layers=config["layers"], num_attention_heads=config["heads"],
        intermediate_size=len(params["blocks.0.mlp.fc1.weight"]), num_labels=config["classes"],
        image_size=8, patch_size=4, layer_norm_eps=1e-6, attn_implementation="eager",
    )).eval()  # fmt: skip
    model.vit.embeddings.register_forward_hook(lambda module, args, out: x)
    weights = {}
    for name, weight in params.items():
        part, _, rest = name.removeprefix("blocks.").partition(".")
        leaf = name.rpartition(".")[2]
        if not name.startswith("blocks."):
            weights[f"{'classifier' if part == 'head' else 'vit.layernorm'}.{leaf}"] = weight
        elif rest.startswith("attn.qkv"):
            for n, each in zip("qkv", weight.chunk(3), strict=True):
                weights[f"vit.layers.{part}.attention.{n}_proj.{leaf}"] = each
        else:
            weights[f"vit.layers.{part}.{NAMES[rest.rpartition('.')[0]]}.{leaf}"] = weight
    missing, unknown = model.load_state_dict(weights, strict=False)
    assert not unknown
    assert all("embeddings" in name for name in missing)
    subject = Subject(model, pixel_values=torch.zeros(len(x), 3, 8, 8))
    with torch.no_grad():
        run, out = passed(subject), readout(model)
        yield case.compare("out.logits", model(subject.pixel_values).logits)
        which = torch.tensor(config["class"])
        for name, h in (("hs", run.stream[1:]), ("attn", run.attention), ("mlp", run.mlp)):
            p = projected(out, h)
            yield case.compare(f"out.{name}_rank", ranks(p, which))
            yield case.compare(f"out.{name}_logit", p[..., config["class"]])
            yield case.compare(f"out.{name}_top5", p.topk(5).indices)
        memories = ClassEmbeddingProjection().memories(subject)
        yield case.compare("out.class_value_attn", memories["attention"])
        yield case.compare("out.class_value_mlp", memories["mlp"])
    with torch.enable_grad():
        given = model(subject.pixel_values, output_attentions=True)
        found = by_gradients(given.logits, given.attentions, which.expand(len(x)))
    yield case.compare("out.chefer_relevance", found[0, 1:])
