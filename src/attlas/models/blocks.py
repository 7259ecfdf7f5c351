"""What all models are built of: pre-norm blocks, and how their weights begin and are loaded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from attlas.errors import UserError
from attlas.hf.caches import Cache
from attlas.hf.models import GradientCheckpointingLayer, PreTrainedModel, is_initialized
from attlas.masks import seen
from attlas.models.config import AttlasConfig, TypedConfig
from attlas.models.packing import Packing
from attlas.models.passing import attended
from attlas.tracing import traced

#: Arguments of `from_pretrained` that say where a checkpoint is.
WHERE = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) · up x)."""

    def __init__(self, config: AttlasConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, int(config.intermediate_size or 0)
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Each token by itself."""
        y: Tensor = self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class MechanismBlock(GradientCheckpointingLayer):  # type: ignore[misc]
    """A block that holds mechanisms, and makes them anew around what a checkpoint gave.

    Attributes:
        makers: how to make its mechanisms, by their names.
        on_meta: whether it was made on the meta device, where constants have no values.
    """

    makers: dict[str, Callable[[], nn.Module]]
    on_meta: bool

    @torch.no_grad()
    def make_real(self) -> None:
        """Make the mechanisms anew after a start on the meta device, around what was loaded.

        Only their constructors know how constants begin that no checkpoint holds, and parameters that
        this one lacks.
        """
        device = next(self.parameters()).device
        for name, maker in self.makers.items():
            loaded: nn.Module = getattr(self, name)
            weights = dict(loaded.named_parameters())
            made = maker()
            for path, parameter in made.named_parameters():
                found = weights[path]
                if not is_initialized(found):
                    found.copy_(parameter)
            kept = dict(loaded.named_buffers())
            persistent = set(loaded.state_dict()) & set(kept)
            made.to(device=device)
            for path in weights | {path: kept[path] for path in persistent}:
                owner, _, leaf = path.rpartition(".")
                setattr(made.get_submodule(owner), leaf, weights.get(path, kept.get(path)))
            setattr(self, name, made.train(loaded.training))
        self.on_meta = False


class Block(MechanismBlock):
    """h += attention(norm h);  h += cross-attention(norm h, context);  h += MLP(norm h)."""

    def __init__(
        self, config: AttlasConfig, layer: int, where: str = "attention", *, causal: bool = False,
        cross: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.makers = {"attention": partial(config.make_attention, layer, where, causal=causal)}
        if cross:
            self.makers["cross_attention"] = partial(
                config.make_attention, layer, "cross_attention", cross=True
            )
        self.attention_norm = nn.RMSNorm(width, eps=eps)
        self.attention = self.makers["attention"]()
        self.cross_norm = nn.RMSNorm(width, eps=eps) if cross else None
        self.cross_attention = self.makers["cross_attention"]() if cross else None
        self.mlp_norm = nn.RMSNorm(width, eps=eps)
        self.mlp = MLP(config)
        self.on_meta = any(p.is_meta for p in self.parameters())

    def forward(
        self, h: Tensor, context: Tensor | None = None, mask: Tensor | None = None,
        position_ids: Tensor | None = None, cache: Cache | None = None,
        context_mask: Tensor | None = None, packing: Packing | None = None, maps: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """One step of the residual stream; with `maps` also those of attention and cross-attention."""
        y, own_map = attended(
            self.attention, self.attention_norm(h), packing, maps, mask=mask, positions=position_ids,
            cache=cache,
        )  # fmt: skip
        h, cross_map = h + y, None
        if self.cross_attention is not None and self.cross_norm is not None:
            y, cross_map = attended(
                self.cross_attention, self.cross_norm(h), None, maps, context=context,
                mask=context_mask, positions=position_ids,
            )  # fmt: skip
            h = h + y
        out: Tensor = h + self.mlp(self.mlp_norm(h))
        return (out, own_map, cross_map) if maps else out


class AttlasModel(PreTrainedModel):  # type: ignore[misc]
    """What all models do with their weights."""

    config_class: ClassVar[type[TypedConfig]] = AttlasConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["Block", "ConvBlock"]

    def initialize_weights(self, *args: Any, **kwargs: Any) -> None:
        """Transformers' initialisation outside attention; attention has its mechanism's own."""
        super().initialize_weights(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, MechanismBlock) and module.on_meta:
                module.make_real()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers, held to the checkpoint's own mechanisms.

        Raises:
            ValueError: a model of another type, or a configuration that names another mechanism.
        """
        path, asked = pretrained_model_name_or_path, kwargs.get("config")
        wanted = asked.attention if isinstance(asked, TypedConfig) else kwargs.get("attention")
        if path is not None and wanted is not None:
            where = {name: kwargs[name] for name in WHERE if name in kwargs}
            stored = cls.config_class.from_pretrained(path, **where).attention
            if stored != wanted:
                raise ValueError(
                    f"attention of the checkpoint is {stored!r}, which cannot be loaded as {wanted!r}"
                )
        return super().from_pretrained(path, *args, **kwargs)


def only_padding(mask: Tensor | None, name: str = "attention_mask") -> Tensor | None:
    """The mask as booleans, or none where all tokens are valid, so that the fastest routes stay open.

    Raises:
        ValueError: floats that do not tell what is seen, such as [batch, keys] of nothing but zeros.
    """
    if mask is None:
        return None
    shown = seen(mask, name)
    if mask.ndim != 2 or traced():
        return shown
    if bool(shown.all()):
        if mask.is_floating_point() and not mask.all():
            raise UserError(
                f"{name} of floats and nothing but zeros: no token or every token? give a bool mask, "
                "True at tokens"
            )
        return None
    return shown
