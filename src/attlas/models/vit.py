"""A vision transformer: an image in patches, blocks with any attention, the mean patch classified.

    h = norm(blocks(W_patch patches + P));   logits = W mean over patches of h

P is learned, where a layer has no positions of its own. The mean takes the place of a class token.
Importing this module registers the types with AutoConfig, AutoModel and AutoModelForImageClassification.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attlas.catalog import registry
from attlas.hf.models import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    BaseModelOutput,
    ImageClassifierOutput,
    can_return_tuple,
)
from attlas.models.blocks import AttlasModel, Block
from attlas.models.config import AttlasConfig
from attlas.models.losses import class_loss
from attlas.models.passing import asked, check_rest, through


class ViTConfig(AttlasConfig):
    """A vision transformer's configuration; what all models take, and:

    Args:
        image_size: height and width.
        patch_size: height and width of a patch, a divisor of `image_size`.
        num_channels: of the images.
        position: "auto" learns one vector for each patch; others are the layers'.

    Raises:
        ValueError: patches that do not tile the image.
    """

    model_type = "attlas-vit"

    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3

    def __post_init__(self, **kwargs: Any) -> None:
        if self.patch_size < 1 or self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size must divide image_size={self.image_size}, got {self.patch_size}"
            )
        super().__post_init__(**kwargs)

    def _position(self, cls: Any, causal: bool) -> Any:
        return None if self.position == "auto" else super()._position(cls, causal)

    @property
    def learns_positions(self) -> bool:
        """Whether the model adds a vector to each patch."""
        names = [self.choice(layer)[0] for layer in range(self.num_hidden_layers)]
        own = not any(registry.find(name).object.supports.position for name in names)  # type: ignore[attr-defined]
        return self.position == "auto" and not own


class ViTModel(AttlasModel):
    """Hidden states of the patches."""

    config_class = ViTConfig
    main_input_name = "pixel_values"

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        width, patch = config.hidden_size, config.patch_size
        self.patches = nn.Conv2d(config.num_channels, width, patch, stride=patch)
        count = (config.image_size // patch) ** 2
        self.positions = nn.Embedding(count, width) if config.learns_positions else None
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(width, eps=config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """What makes tokens of patches."""
        return self.patches

    def set_input_embeddings(self, value: Any) -> None:
        """Replace what makes tokens of patches."""
        self.patches = value

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None,
        output_attentions: bool | None = None, **kwargs: Any,
    ) -> BaseModelOutput:  # fmt: skip
        """Hidden states of the patches, row by row.

        Args:
            pixel_values: [batch, channels, image_size, image_size].
            output_hidden_states: whether to give those between the blocks too.
            output_attentions: whether to give each layer's attention map too.
            kwargs: whatever Transformers passes on besides.

        Raises:
            ValueError: images of another size; maps of layers that have none.
            TypeError: an argument that the model has no use for.
        """
        check_rest(self, kwargs)
        config = self.config
        expected = (config.num_channels, config.image_size, config.image_size)
        if tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"pixel_values must be [batch, *{expected}], got {list(pixel_values.shape)}"
            )
        h = self.patches(pixel_values.to(self.patches.weight.dtype)).flatten(2).transpose(1, 2)
        if self.positions is not None:
            h = h + self.positions(torch.arange(h.shape[1], device=h.device))
        passed = through(
            self.layers, self.norm, h,
            states=asked(config, "output_hidden_states", output_hidden_states),
            maps=asked(config, "output_attentions", output_attentions),
        )  # fmt: skip
        return BaseModelOutput(
            last_hidden_state=passed.last,
            hidden_states=passed.hidden_states,
            attentions=passed.attentions,
        )


class ViT(AttlasModel):
    """An image classifier with `num_labels` classes."""

    config_class = ViTConfig
    main_input_name = "pixel_values"

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        self.model = ViTModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None, **kwargs: Any,
    ) -> ImageClassifierOutput:  # fmt: skip
        """Logits of every image, and the loss with `labels`; as `ViTModel.forward`, and:

        Args:
            labels: numbers of classes; or [batch, num_labels], as `config.problem_type` says.
            num_items_in_batch: labels of all steps of gradient accumulation; those of this one unless
                given.
        """
        out = self.model(pixel_values, return_dict=True, **kwargs)
        logits, loss = self.classifier(out.last_hidden_state.mean(1)), None
        if labels is not None:
            loss = class_loss(logits, labels, self, num_items_in_batch)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=out.hidden_states, attentions=out.attentions
        )


AutoConfig.register(ViTConfig.model_type, ViTConfig, exist_ok=True)
AutoModel.register(ViTConfig, ViTModel, exist_ok=True)
AutoModelForImageClassification.register(ViTConfig, ViT, exist_ok=True)
