"""An encoder: every token sees every other, with any attention; heads for masked tokens and classes.

    h = norm(blocks(E[tokens]));   masked tokens: W h;   classes: W mean over valid tokens of h

Importing this module registers the types with AutoConfig, AutoModel, AutoModelForMaskedLM and
AutoModelForSequenceClassification.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from attlas.errors import UserError
from attlas.hf.models import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BaseModelOutput,
    MaskedLMOutput,
    SequenceClassifierOutput,
    can_return_tuple,
)
from attlas.models.blocks import AttlasModel, Block, only_padding
from attlas.models.config import AttlasConfig
from attlas.models.losses import class_loss, token_loss
from attlas.models.passing import asked, check_mask, check_rest, through


class EncoderConfig(AttlasConfig):
    """An encoder's configuration; what all models take, and:

    Args:
        vocab_size: tokens.
        tie_word_embeddings: whether the output layer for masked tokens is the embedding.
    """

    model_type = "attlas-encoder"

    vocab_size: int = 32000
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None


class Encoder(AttlasModel):
    """Hidden states of tokens that all see each other."""

    config_class = EncoderConfig

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None, output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:  # fmt: skip
        """Hidden states; arguments as in `DecoderModel.forward`.

        As in Transformers' encoders, positions say where tokens stand, and tell no texts apart.

        Raises:
            ValueError: neither or both of `input_ids` and `inputs_embeds`; a mask of another length;
                maps of layers that have none.
            TypeError: an argument that the model has no use for.
        """
        check_rest(self, kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give one of input_ids and inputs_embeds")
        h = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        check_mask(attention_mask, h)
        passed = through(
            self.layers, self.norm, h,
            states=asked(self.config, "output_hidden_states", output_hidden_states),
            maps=asked(self.config, "output_attentions", output_attentions),
            mask=only_padding(attention_mask), position_ids=position_ids,
        )  # fmt: skip
        return BaseModelOutput(
            last_hidden_state=passed.last,
            hidden_states=passed.hidden_states,
            attentions=passed.attentions,
        )


class EncoderForMaskedLM(AttlasModel):
    """An encoder that tells masked tokens."""

    config_class = EncoderConfig
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.model = Encoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_type = "ForMaskedLM"
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        labels: Tensor | None = None, num_items_in_batch: Tensor | int | None = None, **kwargs: Any,
    ) -> MaskedLMOutput:  # fmt: skip
        """Logits of every token, and the loss where `labels` is not −100; as `Encoder.forward`, and:

        Args:
            labels: tokens to tell.
            num_items_in_batch: labels of all steps of gradient accumulation; those of this one unless
                given.
        """
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **kwargs
        )
        logits, loss = self.lm_head(out.last_hidden_state), None
        if labels is not None:
            loss = token_loss(logits, labels, self, num_items_in_batch)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=out.hidden_states, attentions=out.attentions
        )


class EncoderForSequenceClassification(AttlasModel):
    """An encoder that puts sequences in one of `num_labels` classes."""

    config_class = EncoderConfig

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.model = Encoder(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        labels: Tensor | None = None, num_items_in_batch: Tensor | int | None = None, **kwargs: Any,
    ) -> SequenceClassifierOutput:  # fmt: skip
        """Logits of every sequence, and the loss with `labels`; as `Encoder.forward`, and:

        Args:
            labels: numbers of classes; or [batch, num_labels], as `config.problem_type` says.
            num_items_in_batch: labels of all steps of gradient accumulation; those of this one unless
                given.

        Raises:
            ValueError: a mask of pairs, which tells no tokens to take the mean over.
        """
        if attention_mask is not None and attention_mask.ndim != 2:
            raise UserError(
                "attention_mask must be [batch, tokens] here, since the mean is over valid tokens; "
                f"got {list(attention_mask.shape)}"
            )
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **kwargs
        )
        h = out.last_hidden_state
        mask = only_padding(attention_mask)
        if mask is not None and mask.ndim != 2:
            raise ValueError(
                f"attention_mask must be [batch, tokens] where classes are told from the mean over "
                f"tokens, got {list(mask.shape)}"
            )
        valid = h.new_ones(h.shape[:2]) if mask is None else mask.to(h.dtype)
        mean = (h * valid[..., None]).sum(1) / valid.sum(1, keepdim=True).clamp(min=1)
        logits, loss = self.classifier(mean), None
        if labels is not None:
            loss = class_loss(logits, labels, self, num_items_in_batch)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=out.hidden_states, attentions=out.attentions
        )


AutoConfig.register(EncoderConfig.model_type, EncoderConfig, exist_ok=True)
AutoModel.register(EncoderConfig, Encoder, exist_ok=True)
AutoModelForMaskedLM.register(EncoderConfig, EncoderForMaskedLM, exist_ok=True)
AutoModelForSequenceClassification.register(
    EncoderConfig, EncoderForSequenceClassification, exist_ok=True
)
