"""Small random models with something beside the text they read: pictures, encoders, shared blocks."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

#: A text model's sizes.
TEXT: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: A vision tower's: more layers than the text has, and other heads.
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
IMAGE = 96  # the token of a picture's patch
BART: dict[str, Any] = {
    "vocab_size": 97,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def build(kind: Any, config: Any, attention: str = "sdpa") -> Any:
    """A model whose attention is no mere mean."""
    torch.manual_seed(0)
    model = kind._from_config(config, attn_implementation=attention)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.2)
    return model.eval()


def prompt(patches: int = 0, batch: int = 1) -> dict[str, Any]:
    """Tokens, with those of a picture among them, and their mask."""
    ids = torch.randint(3, 90, (batch, 14), generator=torch.Generator().manual_seed(1))
    picture = torch.full((batch, patches), IMAGE)
    ids = torch.cat([ids[:, :4], picture, ids[:, 4:]], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def pixels(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def llama(attention: str = "sdpa", **changed: Any) -> Any:
    return build(hf.LlamaForCausalLM, hf.LlamaConfig(**TEXT | changed), attention)


def llava(attention: str = "sdpa") -> tuple[Any, dict[str, Any]]:
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**TEXT),
        vision_config=hf.CLIPVisionConfig(**VISION),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    config.pad_token_id = 0
    model = build(hf.LlavaForConditionalGeneration, config, attention)
    return model, prompt(17) | {"pixel_values": pixels(1, 3, 16, 16)}


def gemma3(attention: str = "sdpa") -> tuple[Any, dict[str, Any]]:
    """Makes the masks of its text tower itself, which see all of a picture."""
    text = hf.Gemma3TextConfig(
        **TEXT, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    )
    config = hf.Gemma3Config(
        text_config=text.to_dict(),
        vision_config=hf.SiglipVisionConfig(**VISION).to_dict(),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=95,
        eoi_token_index=94,
    )
    given = prompt(4) | {"pixel_values": pixels(1, 3, 16, 16)}
    given["token_type_ids"] = (given["input_ids"] == IMAGE).long()
    return build(hf.Gemma3ForConditionalGeneration, config, attention), given


def qwen2_vl(attention: str = "sdpa") -> tuple[Any, dict[str, Any]]:
    """Its positions have three axes."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {
        "embed_dim": 32,
        "hidden_size": 32,
        "depth": 3,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "in_channels": 3,
        "temporal_patch_size": 1,
    }
    config = hf.Qwen2VLConfig(
        text_config=TEXT | {"rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE,
        vision_start_token_id=95,
        vision_end_token_id=94,
        video_token_id=93,
    )
    given = prompt(4) | {
        "pixel_values": pixels(16, 48),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }
    given["mm_token_type_ids"] = (given["input_ids"] == IMAGE).int()
    return build(hf.Qwen2VLForConditionalGeneration, config, attention), given


def idefics3(attention: str = "sdpa") -> tuple[Any, dict[str, Any]]:
    config = hf.Idefics3Config(
        text_config=hf.LlamaConfig(**TEXT).to_dict(),
        vision_config=VISION,
        image_token_id=IMAGE,
        scale_factor=2,
    )
    model = build(hf.Idefics3ForConditionalGeneration, config, attention)
    return model, prompt(4) | {"pixel_values": pixels(1, 1, 3, 16, 16)}


def opt(attention: str = "sdpa") -> tuple[Any, dict[str, Any]]:
    """Calls its decoder past its base model."""
    config = hf.OPTConfig(
        vocab_size=97,
        hidden_size=32,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        word_embed_proj_dim=32,
    )
    return build(hf.OPTForCausalLM, config, attention), prompt(batch=2)


def bart_decoder(attention: str = "sdpa") -> tuple[Any, dict[str, Any]]:
    config = hf.BartConfig(**BART, is_decoder=True, is_encoder_decoder=False)
    return build(hf.BartForCausalLM, config, attention), prompt(batch=2)


def bart(attention: str = "sdpa") -> Any:
    return build(hf.BartForConditionalGeneration, hf.BartConfig(**BART), attention)


def t5(attention: str = "sdpa") -> Any:
    config = hf.T5Config(
        vocab_size=97,
        d_model=32,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        dropout_rate=0.0,
    )
    return build(hf.T5ForConditionalGeneration, config, attention)


def clip() -> Any:
    text = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    config = hf.CLIPConfig(
        text_config=text
        | {"num_attention_heads": 4, "max_position_embeddings": 64, "eos_token_id": 2},
        vision_config=VISION,
        projection_dim=16,
    )
    return build(hf.CLIPModel, config)


def albert(attention: str = "sdpa") -> Any:
    """Six layers of two blocks."""
    config = hf.AlbertConfig(
        vocab_size=97,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=6,
        num_hidden_groups=2,
        num_attention_heads=4,
        intermediate_size=32,
    )
    return build(hf.AlbertModel, config, attention)


def zamba2() -> Any:
    """One block of attention for two of its six layers, which are told their numbers."""
    config = hf.Zamba2Config(
        **TEXT | {"num_hidden_layers": 6, "num_key_value_heads": 4},
        mamba_d_state=4,
        n_mamba_heads=8,
        mamba_ngroups=1,
        mamba_headdim=8,
        chunk_size=8,
        num_mem_blocks=1,
        adapter_rank=4,
        use_shared_attention_adapter=False,
        layers_block_type=["mamba", "mamba", "hybrid"] * 2,
    )
    return build(hf.Zamba2ForCausalLM, config)


def mllama() -> tuple[Any, dict[str, Any]]:
    """Two of its four layers attend to the picture alone, whose mask is of numbers."""
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_global_layers": 1,
        "attention_heads": 2, "image_size": 16, "patch_size": 4, "max_num_tiles": 1,
        "vision_output_dim": 64, "intermediate_layers_indices": [1], "supported_aspect_ratios": [[1, 1]],
    }  # fmt: skip
    text = TEXT | {"num_hidden_layers": 4, "cross_attention_layers": [1, 3]}
    config = hf.MllamaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE)
    given, one = prompt(1), torch.ones(1, 1, dtype=torch.long)
    tokens = given["input_ids"].shape[1]
    given |= {"pixel_values": pixels(1, 1, 1, 3, 16, 16), "aspect_ratio_ids": one}
    given |= {
        "aspect_ratio_mask": one[None],
        "cross_attention_mask": one[None, None].expand(1, tokens, 1, 1),
    }
    return build(hf.MllamaForConditionalGeneration, config), given
