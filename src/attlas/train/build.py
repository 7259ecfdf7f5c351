"""The model of a run: the type that the task needs, built of the mechanism."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attlas.attention import Attention
from attlas.catalog.kinds import LAYER, MODULE
from attlas.errors import UserError
from attlas.kinds.feature_map import FeatureMap
from attlas.tasks.train import Batch, Task
from attlas.train.operator import Operator
from attlas.train.plan import NONE, Mechanism, Plan

#: What all others are compared with; its model also gives the weights outside attention.
PLAIN = Mechanism("softmax", "softmax")
#: The same where the mechanisms are modules for feature maps: none.
BARE = Mechanism(NONE, NONE)
#: What tasks take that train mechanisms of a kind.
TAKEN = {
    LAYER: "layers of attention, such as softmax",
    MODULE: "modules for feature maps, such as ela-efficient-local, or none",
}


class Net(nn.Module):
    """A model that reads a task's batches.

    Args:
        task: what it is for.
        mechanism: its attention.
        plan: its sizes.
    """

    def __init__(self, task: Task, mechanism: Mechanism, plan: Plan) -> None:
        super().__init__()
        self.kind, inputs = task.needs, task.sizes.inputs
        self.core = _CORES[self.kind](task, mechanism, plan)
        self.read = nn.Linear(inputs, plan.dim) if self.kind == "decoder" and inputs else None

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the task scores, and what the layers add to the loss."""
        if self.kind == "operator":
            output = self.core(batch["inputs"])
        elif self.read is not None:
            output = self.core(inputs_embeds=self.read(batch["inputs"]), use_cache=False).logits
        elif self.kind == "decoder":
            output = self.core(input_ids=batch["input_ids"], use_cache=False).logits
        else:
            given = {name: tensor for name, tensor in batch.items() if name != "targets"}
            output = self.core(**given).logits
        extra = [m.auxiliary_loss for m in attentions(self) if m.auxiliary_loss is not None]
        return output, torch.stack(extra).sum() if extra else output.new_zeros(())


def attentions(model: nn.Module) -> list[Attention | FeatureMap]:
    """The layers of attention, or modules for feature maps, in a model."""
    return [m for m in model.modules() if isinstance(m, (Attention, FeatureMap))]


def build(task: Task, mechanism: Mechanism, plan: Plan, seed: int) -> Net:
    """A model whose weights outside attention are those that every mechanism has with this seed.

    Attention's own weights are drawn after the same seeding, each mechanism's in its own way.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Net(task, mechanism, plan)
        plain = BARE if task.trains is MODULE else PLAIN
        if mechanism.label != plain.label:
            torch.manual_seed(seed)
            _share(Net(task, plain, plan), net)
    return net


@torch.no_grad()
def _share(plain: nn.Module, net: nn.Module) -> None:
    """Copy what has the same name and shape and lies in no layer of attention."""
    inside = tuple(
        name for name, m in net.named_modules() if isinstance(m, (Attention, FeatureMap))
    )
    weights = dict(plain.named_parameters())
    for name, parameter in net.named_parameters():
        outside = not name.startswith(tuple(f"{prefix}." for prefix in inside))
        if outside and name in weights and weights[name].shape == parameter.shape:
            parameter.copy_(weights[name])


def check_fit(plan: Plan, task: Task) -> None:
    """Refuse, before anything is trained, what a mechanism cannot do or cannot be built for.

    Raises:
        UserError: naming the mechanism and the task.
    """
    for mechanism in plan.mechanisms:
        what = f"mechanism {mechanism.label!r} cannot be trained on task {task.name!r}"
        kind = task.trains
        for each in mechanism.turns:
            if each.name == NONE and kind is MODULE:
                continue
            found = NONE if each.name == NONE else each.entry.kind.name
            if found != kind.name:
                raise UserError(f"{what}: it is of kind {found!r}; the task takes {TAKEN[kind]}")
            layer: Any = each.entry.object
            if task.needs == "decoder" and not layer.supports.causal:
                raise UserError(f"{what}: the task needs a decoder and it has no causal form")
            if task.needs == "seq2seq" and not layer.supports.cross:
                raise UserError(f"{what}: the task needs cross-attention and it has no cross form")
        if mechanism.others and task.needs in ("operator", "seq2seq", "convnet"):
            raise UserError(f"{what}: its model has one mechanism for all layers")
        try:
            build(task, mechanism, plan, seed=0)
        except (ValueError, TypeError) as error:
            raise UserError(f"{what}: {error}") from error


def _decoder(task: Task, mechanism: Mechanism, plan: Plan) -> nn.Module:
    from attlas.models.decoder import Decoder, DecoderConfig

    return Decoder(DecoderConfig(
        vocab_size=task.sizes.outputs, max_position_embeddings=task.sizes.length,
        **_sized(mechanism, plan),
    ))  # fmt: skip


def _vit(task: Task, mechanism: Mechanism, plan: Plan) -> nn.Module:
    from attlas.models.vit import ViT, ViTConfig

    channels, size, patch = task.sizes.image
    return ViT(ViTConfig(
        num_labels=task.sizes.outputs, num_channels=channels, image_size=size, patch_size=patch,
        **_sized(mechanism, plan),
    ))  # fmt: skip


def _seq2seq(task: Task, mechanism: Mechanism, plan: Plan) -> nn.Module:
    from attlas.models.seq2seq import Seq2Seq, Seq2SeqConfig

    # The mechanism is what the target finds its source by; each side reads itself by plain attention.
    sizes = _sized(mechanism, plan)
    (cross,) = sizes.pop("attention")
    return Seq2Seq(Seq2SeqConfig(
        vocab_size=task.sizes.outputs, max_position_embeddings=task.sizes.length,
        cross_attention=cross, **sizes,
    ))  # fmt: skip


def _operator(task: Task, mechanism: Mechanism, plan: Plan) -> nn.Module:
    return Operator(
        task.sizes.inputs, task.sizes.outputs, plan.dim, plan.layers, plan.heads, mechanism.name,
        dict(mechanism.options),
    )  # fmt: skip


def _convnet(task: Task, mechanism: Mechanism, plan: Plan) -> nn.Module:
    from attlas.models.convnet import ConvNet, ConvNetConfig

    (attention,) = mechanism.attention
    halvings = 2 ** (plan.layers - 1)
    if plan.dim % halvings:
        raise ValueError(
            f"dim must be a multiple of {halvings} for layers={plan.layers}, got {plan.dim}"
        )
    return ConvNet(ConvNetConfig(
        num_labels=task.sizes.outputs, num_channels=task.sizes.image[0], attention=attention,
        hidden_sizes=[plan.dim * 2**stage // halvings for stage in range(plan.layers)],
        depths=[1] * plan.layers,
    ))  # fmt: skip


_CORES = {
    "decoder": _decoder, "vit": _vit, "seq2seq": _seq2seq, "operator": _operator, "convnet": _convnet,
}  # fmt: skip


def _sized(mechanism: Mechanism, plan: Plan) -> dict[str, Any]:
    """What all models of `attlas.models` take."""
    return {
        "hidden_size": plan.dim,
        "num_hidden_layers": plan.layers,
        "num_attention_heads": plan.heads,
        "attention": mechanism.attention,
    }
