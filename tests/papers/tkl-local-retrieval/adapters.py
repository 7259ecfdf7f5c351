"""The adapter of the TKL ranker to published numbers."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attlas.bases.kernel_ranking import TERMS, LocalRanker
from attlas.contract.cases import Case, Check, adapter, load_weights

#: Our names of a layer's parts, and theirs.
NAMES = {"up": "linear1", "down": "linear2", "norm1": "norm1", "norm2": "norm2"}


class Published(LocalRanker):
    """The authors' number of chunks: 1 to overlap − 1 words more than whole chunks are context alone."""

    def chunks(self, words: int) -> int:
        return 1 + max(0, words - self.overlap) // self.chunk + 2 * self.overlap // self.chunk


@adapter("tkl", mechanism="tkl-local-retrieval")
def tkl(case: Case) -> Iterator[Check]:
    """The document in context and the score, with either saturation."""
    config, given, weights = case.config, case.inputs, case.params
    query, document = given["query"], given["document"]
    case.sizes(query, "B query_len dim")
    case.sizes(document, "B doc_len dim")
    case.states(extended_chunk=config["chunk_size"] + 2 * config["overlap"], use_diff_posencoding=True)
    places, log = config["use_pos_encoding"], config["saturation"] == "log"
    ranker = Published(
        dim=config["dim"], heads=config["heads"], layers=config["layers"], ff=config["ff"],
        chunk=config["chunk_size"], overlap=config["overlap"], window=config["sliding_window"],
        regions=config["top_k_chunks"], saturation=config["saturation"], places=places,
        centres=tuple(weights["mu"].tolist()), widths=tuple(weights["sigma"].tolist()),
    )  # fmt: skip
    ours = {
        "mixer": weights["mixer"], "kernel_weights": weights["dense.weight"][0],
        "region_weights": weights["chunk_scoring"].view(5, -1),
    }  # fmt: skip
    for i in range(config["layers"]):
        theirs, own = f"contextualizer.layers.{i}.", f"blocks.{i}."
        for kind in ("weight", "bias"):
            joined = weights[f"{theirs}self_attn.in_proj_{kind}"].chunk(3)
            for name, part in zip("qkv", joined, strict=True):
                ours[f"{own}attention.{name}_proj.{kind}"] = part
            ours[f"{own}attention.o_proj.{kind}"] = weights[f"{theirs}self_attn.out_proj.{kind}"]
            for name, said in NAMES.items():
                ours[f"{own}{name}.{kind}"] = weights[f"{theirs}{said}.{kind}"]
    of_places = {"query_places": "positional_features_q", "document_places": "positional_features_d"}
    of_sums = ("saturation_linear", "saturation_linear2", "saturation_linear3")
    if places:
        sizes = {"query_places": TERMS, "document_places": config["extended_chunk"]}
        ours |= {own: weights[said][0, : sizes[own]] for own, said in of_places.items()}
    else:
        case.without_effect(*(f"param.{name}" for name in of_places.values()))
    unused = ["mixer_sat", "mixer_end"]
    if log:
        ours["kernel_scale"] = weights["kernel_mult"][0].flatten()
        unused += [f"{n}.{kind}" for n in (*of_sums, "sat_normer") for kind in ("weight", "bias")]
        unused += ["sat_emb_reduce1.weight"]
    else:
        unused += ["kernel_mult"]
        ours["salience.weight"] = weights["sat_emb_reduce1.weight"]
        for kind in ("weight", "bias"):
            ours[f"norm.{kind}"] = weights[f"sat_normer.{kind}"]
            ours[f"saturate.{kind}"] = torch.cat([weights[f"{name}.{kind}"] for name in of_sums])
    case.without_effect(*(f"param.{name}" for name in unused))
    load_weights(ranker, ours)
    masks = given["query_mask"].bool(), given["document_mask"].bool()
    if "contextualised_document" in case.mids:
        read = ranker.read(document, masks[1])[:, : document.shape[1]]
        yield case.compare("mid.contextualised_document", read)
    yield case.compare("out.score", ranker(query, document, *masks))
