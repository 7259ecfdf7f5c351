"""Small models, ours and Transformers', in the form that the mixins ask of a model's tester."""

from __future__ import annotations

from typing import Any

import torch

TEXT = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 37, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


class Tester:
    """What the mixins read of a tester: sizes, a configuration and inputs."""

    batch_size = 4
    seq_length = 7
    is_training = True
    num_hidden_layers = 2
    num_attention_heads = 4
    hidden_size = 32
    causal_lm_class: Any = None

    def __init__(self, config_class: Any, **options: Any) -> None:
        self.config_class, self.options = config_class, options

    def get_config(self) -> Any:
        return self.config_class(**self.options)

    def ids(self) -> torch.Tensor:
        return torch.randint(3, self.options["vocab_size"], (self.batch_size, self.seq_length))

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        ids = self.ids()
        return self.get_config(), {"input_ids": ids, "attention_mask": self.mask(ids)}

    def mask(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(ids)


class SourceAndTarget(Tester):
    """Of a model with a source and a target."""

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        source, target = self.ids(), self.ids()
        inputs = {
            "input_ids": source, "attention_mask": self.mask(source),
            "decoder_input_ids": target, "decoder_attention_mask": self.mask(target),
        }  # fmt: skip
        return self.get_config(), inputs


class Images(Tester):
    """Of a model of images; tokens are patches."""

    image_size, patch_size, num_channels, num_masks, mask_length = 8, 4, 3, 2, 4

    def __init__(self, config_class: Any, seq_length: int, **options: Any) -> None:
        sizes = {name: getattr(self, name) for name in ("image_size", "patch_size", "num_channels")}
        super().__init__(config_class, **sizes, **options)
        self.seq_length = seq_length

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        size = (self.batch_size, self.num_channels, self.image_size, self.image_size)
        return self.get_config(), {"pixel_values": torch.rand(size)}
