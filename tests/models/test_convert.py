"""GGUF and ONNX files become the models that they hold, tensor for tensor."""

import json

import pytest
import torch
import transformers

from attlas.errors import UserError
from attlas.models.fetch import dinov2
from attlas.models.fetch.catalogue import MODELS
from attlas.models.fetch.convert import finish
from attlas.models.fetch.gemma_tokenizer import merges

PIECES = [
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "\n\n",
    "  ",
    "<b>",
    "\n",
    "▁",
    "a",
    "b",
    "c",
    "ab",
    "▁ab",
    "bc",
]
CONTROL, USER, NORMAL = 3, 4, 1
NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


@pytest.fixture
def gemma(tmp_path, monkeypatch):
    """A small Gemma 3 and the folder that its GGUF file was converted to."""
    gguf = pytest.importorskip("gguf", reason="the extra `gemma3-270m` is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = transformers.Gemma3TextConfig(
        vocab_size=len(PIECES), hidden_size=32, intermediate_size=64, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=1, head_dim=16, sliding_window=8,
        max_position_embeddings=64, bos_token_id=2, eos_token_id=1, pad_token_id=0,
        query_pre_attn_scalar=256,
    )  # fmt: skip
    model = transformers.Gemma3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.normal_()
    state = model.state_dict()
    writer = gguf.GGUFWriter(tmp_path / "small.gguf", "gemma3")
    writer.add_name("small")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(6)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_rope_freq_base(1e6)
    writer.add_sliding_window(8)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(PIECES)
    writer.add_token_scores([-1000.0 if n < 8 else -float(n) for n in range(len(PIECES))])
    writer.add_token_types([CONTROL] * 4 + [USER] * 3 + [NORMAL] * (len(PIECES) - 7))
    for name, number in (("bos", 2), ("eos", 1), ("unk", 3), ("pad", 0)):
        getattr(writer, f"add_{name}_token_id")(number)
    # llama.cpp keeps norms as they multiply; Transformers adds one to what it keeps.
    tensors = {
        "token_embd": state["model.embed_tokens.weight"],
        "output_norm": state["model.norm.weight"] + 1,
    }
    for layer in range(6):
        for short, long in NAMES.items():
            held = state[f"model.layers.{layer}.{long}.weight"]
            tensors[f"blk.{layer}.{short}"] = held + 1 if "norm" in short else held
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    finish(MODELS["gemma3-270m"], tmp_path / "small.gguf", tmp_path / "made")
    return model, tmp_path / "made"


def test_gemma(gemma):
    model, folder = gemma
    again = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    for name, held in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], held, rtol=0, atol=5e-7)  # norms: ±1
    kinds = again.config.layer_types
    assert kinds == ["sliding_attention"] * 5 + ["full_attention"]
    ids = torch.randint(4, len(PIECES), (1, 40))  # longer than the window
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_gemmas_tokenizer(gemma):
    tokenizer = transformers.AutoTokenizer.from_pretrained(gemma[1])
    known = {piece: number for number, piece in enumerate(PIECES)}
    for text, pieces in (
        ("abc", ["ab", "c"]),  # ab was joined before bc
        (" ab", ["▁ab"]),
        ("  ab", ["  ", "ab"]),  # runs of spaces before words
        ("<b>a\n\n\nb", ["<b>", "a", "\n\n", "\n", "b"]),
        ("", []),
    ):
        ids = [known["<bos>"], *(known[piece] for piece in pieces)]
        assert tokenizer(text)["input_ids"] == ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<bos>",
        "<eos>",
        "<pad>",
    )


def test_merges_come_in_the_order_of_their_pieces():
    pieces = {piece: n for n, piece in enumerate(["aa", "a", "aaa", "b", "ab", "aab"])}
    assert merges(pieces) == [
        ("a", "a"), ("aa", "a"), ("a", "aa"), ("a", "b"), ("aa", "b"), ("a", "ab"),
    ]  # fmt: skip


@pytest.fixture
def graph(tmp_path):
    """A small DINOv2 and an ONNX graph that names its weights as the exporter of `vit` did."""
    onnx = pytest.importorskip("onnx", reason="the extra `vit` is not installed")
    config = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=6, image_size=518, patch_size=14
    )
    model = transformers.Dinov2Model(config).eval()
    model.save_pretrained(tmp_path / "published")
    from safetensors.torch import load_file

    nodes, arrays = [], {}
    for name, tensor in load_file(tmp_path / "published" / "model.safetensors").items():
        if name == "embeddings.position_embeddings":
            arrays["first"], arrays["rest"] = tensor[:, :1], tensor[:, 1:]
            for node, array in zip(dinov2.POSITIONS, ("first", "rest"), strict=True):
                nodes.append(
                    onnx.helper.make_node("Identity", [array], [f"{array}_out"], name=node)
                )
        elif name.endswith(".weight") and tensor.ndim == 2:
            arrays[f"onnx::MatMul_{len(arrays)}"] = tensor.T
            path = name.removesuffix(".weight").replace(".", "/").replace("layer/", "layer.")
            nodes.append(
                onnx.helper.make_node(
                    "MatMul", ["x", list(arrays)[-1]], [path], name=f"/backbone/{path}/MatMul"
                )
            )
        elif name != "embeddings.mask_token":
            arrays[f"backbone.{name}"] = tensor
    arrays["decoder.final_conv.weight"] = torch.zeros(1, 24, 1, 1)
    initializers = [
        onnx.numpy_helper.from_array(tensor.contiguous().numpy(), name)
        for name, tensor in arrays.items()
    ]
    made = onnx.helper.make_graph(nodes, "small", [], [], initializers)
    return model, onnx.helper.make_model(made), tmp_path / "small.onnx"


def test_dinov2(graph, tmp_path):
    model, made, path = graph
    path.write_bytes(made.SerializeToString())
    (tmp_path / "made").mkdir()
    dinov2.write(path, tmp_path / "made")
    again = transformers.AutoModel.from_pretrained(tmp_path / "made").eval()
    assert json.loads((tmp_path / "made" / "config.json").read_text())["num_hidden_layers"] == 2
    picture = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        assert torch.equal(again(picture).last_hidden_state, model(picture).last_hidden_state)


def test_another_graph_is_refused(graph, tmp_path):
    _, made, path = graph
    del made.graph.node[-1]  # a matrix that nobody says the name of
    path.write_bytes(made.SerializeToString())
    (tmp_path / "made").mkdir()
    with pytest.raises(UserError, match=r"small.onnx is not the graph that attlas knows"):
        dinov2.write(path, tmp_path / "made")
