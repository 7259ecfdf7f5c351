"""A small residual convolutional network, with any module for feature maps in its blocks.

    x = relu(norm(conv image))
    x = relu(shortcut(x) + module(norm(conv(relu(norm(conv x))))))        in every block
    logits = W mean over positions of x

All stages but the first halve height and width. Norms are over the whole map of an image (one group),
so that an image's logits do not depend on what else is in the batch.
Importing this module registers the types with AutoConfig, AutoModel and AutoModelForImageClassification.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import relu

from attlas.catalog import registry
from attlas.catalog.kinds import MODULE
from attlas.errors import UserError, at_least_one
from attlas.hf.models import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    BaseModelOutputWithNoAttention,
    ImageClassifierOutputWithNoAttention,
    can_return_tuple,
    mark_initialized,
)
from attlas.hf.models import initialization as init
from attlas.kinds.feature_map import FeatureMap
from attlas.models.blocks import AttlasModel, MechanismBlock
from attlas.models.config import TypedConfig, in_full_precision
from attlas.models.losses import class_loss
from attlas.models.passing import asked, check_rest

#: Stands for no module.
NONE = "none"


class ConvNetConfig(TypedConfig):
    """A convolutional network's configuration.

    Args:
        num_channels: of the images.
        hidden_sizes: channels of each stage.
        depths: blocks of each stage.
        attention: a registered module, {"name": ..., **options}, or "none".
        initializer_range: standard deviation of the classifier's weights.

    Raises:
        ValueError: stages that do not match, an unknown module, or one that is of another kind.
    """

    model_type = "attlas-convnet"

    num_channels: int = 3
    hidden_sizes: Sequence[int] = (32, 64, 128)
    depths: Sequence[int] = (1, 1, 1)
    attention: Any = NONE
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        at_least_one("num_channels", self.num_channels)
        self.hidden_sizes = [at_least_one("hidden_sizes", size) for size in self.hidden_sizes]
        self.depths = [at_least_one("depths", depth) for depth in self.depths]
        if not self.hidden_sizes or len(self.hidden_sizes) != len(self.depths):
            raise ValueError(
                f"depths must hold a number of blocks for each of hidden_sizes={self.hidden_sizes}, "
                f"got {self.depths}"
            )
        try:
            json.dumps(self.attention)
        except TypeError as error:
            raise ValueError(f"attention must hold what JSON can: {error}") from error
        self.choice()
        super().__post_init__(**kwargs)

    def choice(self) -> tuple[str, dict[str, Any]]:
        """The module's name and the options written with it."""
        written = self.attention
        options = dict(written) if isinstance(written, Mapping) else {"name": written}
        name = options.pop("name", None)
        if not isinstance(name, str):
            raise ValueError(f"attention takes a name, or options with a 'name', got {written!r}")
        if name == NONE:
            if options:
                raise ValueError(f"attention: 'none' takes no options, got {options}")
            return name, options
        entry = registry.find(name)
        if entry.kind is not MODULE:
            raise UserError(
                f"attention: {name!r} is no module for feature maps but a registered {entry.kind.name}"
            )
        return entry.name, options

    def make_attention(self, stage: int) -> FeatureMap | nn.Identity:
        """The module of a block of a stage.

        Raises:
            ValueError: what does not fit, with the module's name.
        """
        name, options = self.choice()
        if name == NONE:
            return nn.Identity()
        cls: Any = registry.find(name).object
        if cls.takes_previous:
            options["previous"] = [self.hidden_sizes[0], *self.hidden_sizes[:stage]]
        try:
            made: FeatureMap = in_full_precision(
                name, {"channels": self.hidden_sizes[stage], **options}
            )
        except (ValueError, TypeError) as error:
            raise ValueError(f"attention {name!r} in stage {stage}: {error}") from error
        if made.stride != 1:
            raise ValueError(
                f"attention {name!r}: stride must be 1 in these blocks, whose convolutions shrink the "
                f"map, got {made.stride}"
            )
        for module in made.modules():  # a mechanism initialises itself; Transformers shall not
            mark_initialized(module)
        return made


def _conv(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(conv, nn.GroupNorm(1, outputs))


class ConvBlock(MechanismBlock):
    """x = relu(shortcut(x) + attention(norm(conv(relu(norm(conv(x)))))))."""

    def __init__(self, config: ConvNetConfig, stage: int, inputs: int, *, down: bool) -> None:
        super().__init__()
        width, stride = config.hidden_sizes[stage], 2 if down else 1
        self.first = _conv(inputs, width, stride=stride)
        self.second = _conv(width, width)
        self.makers = {"attention": partial(config.make_attention, stage)}
        self.attention = self.makers["attention"]()
        plain = stride == 1 and inputs == width
        self.shortcut = nn.Identity() if plain else _conv(inputs, width, 1, stride)
        self.on_meta = any(p.is_meta for p in self.parameters())

    def forward(self, x: Tensor, previous: Sequence[Tensor] = ()) -> Tensor:
        """One block; `previous` are the maps of the stem and of the stages before."""
        y = self.second(relu(self.first(x)))
        takes = getattr(self.attention, "takes_previous", False)
        y = self.attention(y, previous) if takes else self.attention(y)
        return relu(self.shortcut(x) + y)


class _Convolutional(AttlasModel):
    """What the network with and without a classifier have in common."""

    config_class = ConvNetConfig
    main_input_name = "pixel_values"

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class ConvNetModel(_Convolutional):
    """The last stage's map."""

    def __init__(self, config: ConvNetConfig) -> None:
        super().__init__(config)
        inputs = config.hidden_sizes[0]
        self.stem = _conv(config.num_channels, inputs)
        stages = []
        for stage, (width, depth) in enumerate(zip(config.hidden_sizes, config.depths, strict=True)):
            stages.append(nn.ModuleList(
                ConvBlock(config, stage, width if block else inputs, down=stage > 0 and not block)
                for block in range(depth)
            ))  # fmt: skip
            inputs = width
        self.stages = nn.ModuleList(stages)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The first convolution, with its norm."""
        return self.stem

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the first convolution and its norm."""
        self.stem = value

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, **kwargs: Any
    ) -> BaseModelOutputWithNoAttention:
        """The last stage's map [batch, channels, height, width].

        Args:
            pixel_values: [batch, num_channels, height, width], of any height and width.
            output_hidden_states: whether to give the maps of the stem and of every stage too.
            kwargs: whatever Transformers passes on besides.

        Raises:
            ValueError: images of other channels.
            TypeError: an argument that the model has no use for, such as `output_attentions`.
        """
        config = self.config
        check_rest(self, {"output_attentions": config.output_attentions, **kwargs})
        if pixel_values.ndim != 4 or pixel_values.shape[1] != config.num_channels:
            raise ValueError(
                f"pixel_values must be [batch, {config.num_channels}, height, width], "
                f"got {list(pixel_values.shape)}"
            )
        x = relu(self.stem(pixel_values.to(self.dtype)))
        previous = [x]
        for stage in self.stages:
            earlier = tuple(previous)
            for block in stage.children():
                x = block(x, earlier)
            previous.append(x)
        states = asked(config, "output_hidden_states", output_hidden_states)
        return BaseModelOutputWithNoAttention(
            last_hidden_state=x, hidden_states=tuple(previous) if states else None
        )


class ConvNet(_Convolutional):
    """An image classifier with `num_labels` classes."""

    def __init__(self, config: ConvNetConfig) -> None:
        super().__init__(config)
        self.model = ConvNetModel(config)
        self.classifier = nn.Linear(config.hidden_sizes[-1], config.num_labels)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None, **kwargs: Any,
    ) -> ImageClassifierOutputWithNoAttention:  # fmt: skip
        """Logits of every image, and the loss with `labels`; as `ConvNetModel.forward`, and:

        Args:
            labels: numbers of classes; or [batch, num_labels], as `config.problem_type` says.
            num_items_in_batch: labels of all steps of gradient accumulation; those of this one unless
                given.
        """
        out = self.model(pixel_values, return_dict=True, **kwargs)
        logits, loss = self.classifier(out.last_hidden_state.mean((2, 3))), None
        if labels is not None:
            loss = class_loss(logits, labels, self, num_items_in_batch)
        return ImageClassifierOutputWithNoAttention(
            loss=loss, logits=logits, hidden_states=out.hidden_states
        )


AutoConfig.register(ConvNetConfig.model_type, ConvNetConfig, exist_ok=True)
AutoModel.register(ConvNetConfig, ConvNetModel, exist_ok=True)
AutoModelForImageClassification.register(ConvNetConfig, ConvNet, exist_ok=True)
