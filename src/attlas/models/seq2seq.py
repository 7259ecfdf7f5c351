"""An encoder–decoder: the decoder's blocks also attend to what the encoder made of the source.

    context = norm(encoder(E[source]));   logits = W norm(decoder(E[target], context))

Cross-attention computes its keys anew at every step, since mechanisms differ in what could be kept. One
whose weights rest on earlier queries (`supports.queries`, "earlier") has the whole target at every step,
and the model then keeps nothing.
Importing this module registers the types with AutoConfig and AutoModelForSeq2SeqLM.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attlas.hf.caches import NAME, Cache, DynamicCache, EncoderDecoderCache, own_tokens, the_cache
from attlas.hf.models import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    BaseModelOutput,
    Seq2SeqLMOutput,
    can_return_tuple,
)
from attlas.models.blocks import AttlasModel, Block, only_padding
from attlas.models.config import AttlasConfig
from attlas.models.generating import AttlasGenerationMixin, is_stateful, kept_cache
from attlas.models.losses import token_loss
from attlas.models.passing import asked, check_mask, check_rest, through


class Seq2SeqConfig(AttlasConfig):
    """An encoder–decoder's configuration; what all models take, each side having all layers, and:

    Args:
        vocab_size: tokens of both sides.
        encoder_attention: of the encoder's layers, written as `attention`; the same unless given.
        cross_attention: from the decoder to the encoder; the same unless given.
        decoder_start_token_id: before the first token of a target.
        tie_word_embeddings: whether the output layer is the embedding, which both sides share.
    """

    model_type = "attlas-seq2seq"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [NAME]
    places = ("encoder_attention", "cross_attention")

    vocab_size: int = 32000
    encoder_attention: Any = None
    cross_attention: Any = None
    tie_word_embeddings: bool = True
    use_cache: bool = True
    is_encoder_decoder: bool = True
    decoder_start_token_id: int = 1
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None


class Seq2SeqEncoder(AttlasModel):
    """The side that reads; its embedding is the model's."""

    config_class = Seq2SeqConfig

    def __init__(self, config: Seq2SeqConfig, embed_tokens: nn.Embedding) -> None:
        super().__init__(config)
        #: In a tuple, for it is the model's, and saved there.
        self.embedding = (embed_tokens,)
        self.layers = nn.ModuleList(
            Block(config, i, "encoder_attention") for i in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding of both sides."""
        return self.embedding[0]

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace it here; the model's method replaces it on both sides."""
        self.embedding = (value,)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None, output_hidden_states: bool | None = None,
        output_attentions: bool | None = None, **kwargs: Any,
    ) -> BaseModelOutput:  # fmt: skip
        """What the decoder attends to, [batch, tokens, hidden_size]; arguments as in `Encoder.forward`.

        Raises:
            ValueError: as `Encoder.forward`.
            TypeError: an argument that the model has no use for.
        """
        check_rest(self, kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give one of input_ids and inputs_embeds")
        h = self.embedding[0](input_ids) if inputs_embeds is None else inputs_embeds
        check_mask(attention_mask, h)
        passed = through(
            self.layers, self.norm, h,
            states=asked(self.config, "output_hidden_states", output_hidden_states),
            maps=asked(self.config, "output_attentions", output_attentions),
            mask=only_padding(attention_mask),
        )  # fmt: skip
        return BaseModelOutput(
            last_hidden_state=passed.last,
            hidden_states=passed.hidden_states,
            attentions=passed.attentions,
        )


class Seq2Seq(AttlasModel, AttlasGenerationMixin):
    """An encoder–decoder language model."""

    config_class = Seq2SeqConfig
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "shared.weight"}

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.shared = nn.Embedding(config.vocab_size, width, config.pad_token_id)
        self.encoder = Seq2SeqEncoder(config, self.shared)
        self.layers = nn.ModuleList(
            Block(config, i, causal=True, cross=True) for i in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(width, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        #: Whether keys and values of the target can be kept from step to step.
        layers: Any = self.layers
        self.keeps = all(layer.cross_attention.supports.queries == "alone" for layer in layers)
        self._is_stateful = is_stateful(layer.attention for layer in layers)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding of both sides."""
        return self.shared

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding of both sides."""
        self.shared = value
        self.encoder.set_input_embeddings(value)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None, decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[Tensor, ...] | None = None,
        cache: Cache | None = None, inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
        use_cache: bool | None = None, output_hidden_states: bool | None = None,
        output_attentions: bool | None = None, past_key_values: Cache | None = None,
        num_items_in_batch: Tensor | int | None = None, **kwargs: Any,
    ) -> Seq2SeqLMOutput:  # fmt: skip
        """Logits of the target's tokens.

        Args:
            input_ids: the source, [batch, tokens]; or `inputs_embeds`, [batch, tokens, hidden_size].
            attention_mask: 1 at the source's valid tokens.
            decoder_input_ids: the target, beginning with `decoder_start_token_id`; the labels moved
                by one unless given.
            decoder_attention_mask: 1 at the target's valid tokens, cached ones included.
            encoder_outputs: what the encoder made of the source, instead of `input_ids`.
            cache: what earlier steps have kept.
            inputs_embeds: instead of `input_ids`.
            decoder_inputs_embeds: instead of `decoder_input_ids`.
            labels: target tokens to predict, −100 where none is.
            use_cache: whether to make a cache where none is given.
            output_hidden_states: whether to give those between the blocks of both sides too.
            output_attentions: whether to give each layer's maps too, those of cross-attention included.
            past_key_values: the name of `cache` before Transformers 5.24.
            num_items_in_batch: labels of all steps of gradient accumulation; those of this one unless
                given.
            kwargs: whatever Transformers passes on besides.

        Raises:
            ValueError: no source or target, or both forms of one; a cache where cross-attention needs
                the earlier queries; a mask of another length; maps of layers that have none.
            TypeError: an argument that the model has no use for.
        """
        check_rest(self, kwargs)
        cache = the_cache(cache, past_key_values)
        if cache is not None and not self.keeps:
            raise ValueError("cache: this cross-attention needs the whole target each time")
        wanted = {
            "output_hidden_states": asked(self.config, "output_hidden_states", output_hidden_states),
            "output_attentions": asked(self.config, "output_attentions", output_attentions),
        }
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds,
                return_dict=True, **wanted,
            )  # fmt: skip
        elif inputs_embeds is not None:
            raise ValueError("give one of encoder_outputs and inputs_embeds")
        h = self._target(decoder_input_ids, decoder_inputs_embeds, labels)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache = kept_cache(
            self, cache, use_cache and self.keeps,
            lambda: EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache()),
        )  # fmt: skip
        own, context = own_tokens(cache), encoder_outputs[0]
        check_mask(decoder_attention_mask, h, own)
        check_mask(attention_mask, context)
        mask = only_padding(decoder_attention_mask, "decoder_attention_mask")
        context_mask = only_padding(attention_mask)
        # Cross-attention has no cache to tell it where the target's tokens stand.
        seen, count = 0 if own is None else int(own.get_seq_length()), h.shape[1]
        positions = torch.arange(seen, seen + count, device=h.device)
        if mask is not None and mask.ndim == 2:
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -count:]
        passed = through(
            self.layers, self.norm, h, context,
            states=wanted["output_hidden_states"], maps=wanted["output_attentions"], mask=mask,
            position_ids=positions, cache=own, context_mask=context_mask,
        )  # fmt: skip
        logits, loss = self.lm_head(passed.last), None
        if labels is not None:
            loss = token_loss(logits, labels, self, num_items_in_batch)
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            decoder_hidden_states=passed.hidden_states,
            decoder_attentions=passed.attentions,
            cross_attentions=passed.cross_attentions,
            encoder_last_hidden_state=context,
            encoder_hidden_states=getattr(encoder_outputs, "hidden_states", None),
            encoder_attentions=getattr(encoder_outputs, "attentions", None),
            **{NAME: cache},
        )

    def _target(
        self, ids: Tensor | None, embeds: Tensor | None, labels: Tensor | None
    ) -> Tensor:
        """The target's tokens, embedded."""
        if ids is not None and embeds is not None:
            raise ValueError("give one of decoder_input_ids and decoder_inputs_embeds")
        if embeds is not None:
            return embeds
        if ids is None:
            if labels is None:
                raise ValueError("give decoder_input_ids, decoder_inputs_embeds or labels")
            ids = self.prepare_decoder_input_ids_from_labels(labels)
        h: Tensor = self.shared(ids)
        return h

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers; `use_cache` is off where nothing can be kept."""
        return super().generate(*args, **kwargs if self.keeps else {**kwargs, "use_cache": False})

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """The start token, then the labels but the last, padding where there was none."""
        moved = labels.roll(1, dims=-1)
        moved[:, 0] = self.config.decoder_start_token_id
        return moved.masked_fill(moved == -100, self.config.pad_token_id or 0)


AutoConfig.register(Seq2SeqConfig.model_type, Seq2SeqConfig, exist_ok=True)
AutoModelForSeq2SeqLM.register(Seq2SeqConfig, Seq2Seq, exist_ok=True)
