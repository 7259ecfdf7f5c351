"""DINOv2 out of an ONNX graph that PyTorch exported from Transformers' own model.

The exporter kept the names of weights, except of those that it transposed: a linear layer's matrix
appears as `onnx::MatMul_N`, and only the node that multiplies by it still says whose it was. The
graph's head, a decoder that draws a heat map, is no part of DINOv2 and is left out.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from attlas.errors import UserError

PREFIX = "backbone."
MATRIX = re.compile(r"^/backbone/(.+)/MatMul$")
#: The nodes that read the position embeddings, of the class token and of the patches.
POSITIONS = ("/backbone/embeddings/Concat_6", "/backbone/embeddings/Reshape_1")
#: Not to be seen in the graph: pictures in pre-training, and heads in which 384 channels are read.
IMAGE, HEADS = 518, 6


def write(path: Path, into: Path) -> None:
    """Write the graph's weights as a Transformers checkpoint, in float32.

    The names are those of published DINOv2 checkpoints, which every Transformers reads.

    Raises:
        UserError: weights that the model has not, or has and the graph lacks.
    """
    import onnx

    from attlas.hf.models import Dinov2Config, Dinov2Model

    # No file beside this one is read, whatever the graph asks for.
    graph = onnx.load(str(path), load_external_data=False).graph
    arrays = {
        tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())
        for tensor in graph.initializer
    }
    weights = {n.removeprefix(PREFIX): t for n, t in arrays.items() if n.startswith(PREFIX)}
    read_by = {
        node.name: arrays[name] for node in graph.node for name in node.input if name in arrays
    }
    for node, matrix in read_by.items():
        if found := MATRIX.match(node):
            weights[found.group(1).replace("/", ".") + ".weight"] = matrix.T
    try:
        first, rest = (read_by[node] for node in POSITIONS)
        weights["embeddings.position_embeddings"] = torch.cat([first, rest], dim=1)
        patches = weights["embeddings.patch_embeddings.projection.weight"]
    except KeyError as error:
        raise _unknown(path, f"it lacks {error}") from error
    # Pre-training alone used the mask token: the graph has none, and no forward pass reads it.
    weights["embeddings.mask_token"] = torch.zeros(1, patches.shape[0])
    layers = {name.split(".")[2] for name in weights if name.startswith("encoder.layer.")}
    config = Dinov2Config(
        hidden_size=patches.shape[0], num_attention_heads=HEADS, num_hidden_layers=len(layers),
        image_size=IMAGE, patch_size=patches.shape[-1],
    )  # fmt: skip
    config.save_pretrained(into)
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()},
        into / "model.safetensors",
        metadata={"format": "pt"},
    )
    _, told = Dinov2Model.from_pretrained(into, output_loading_info=True)
    wrong = {kind: sorted(names)[:3] for kind, names in told.items() if names}
    if wrong:
        raise _unknown(path, f"Transformers found {wrong}")


def _unknown(path: Path, what: str) -> UserError:
    return UserError(
        f"{path.name} is not the graph that attlas knows: {what}; run `attlas fetch vit`"
    )
