"""A decoder: a causal language model in Llama's manner, with any attention that has a causal form.

    logits = W norm(blocks(E[tokens]))

Importing this module registers the types with AutoConfig, AutoModel and AutoModelForCausalLM.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from attlas.hf.caches import NAME, Cache, DynamicCache, the_cache
from attlas.hf.models import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    can_return_tuple,
)
from attlas.models.blocks import AttlasModel, Block, only_padding
from attlas.models.config import AttlasConfig
from attlas.models.generating import AttlasGenerationMixin, is_stateful, kept_cache
from attlas.models.losses import IGNORED, token_loss
from attlas.models.packing import unpacked
from attlas.models.passing import asked, check_mask, check_rest, through


class DecoderConfig(AttlasConfig):
    """A decoder's configuration; what all models take, and:

    Args:
        vocab_size: tokens.
        tie_word_embeddings: whether the output layer is the embedding.
        use_cache: whether keys and values are kept from step to step.
    """

    model_type = "attlas-decoder"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [NAME]

    vocab_size: int = 32000
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None


class DecoderModel(AttlasModel):
    """The blocks, without the output layer."""

    config_class = DecoderConfig

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            Block(config, layer, causal=True) for layer in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, cache: Cache | None = None,
        inputs_embeds: Tensor | None = None, use_cache: bool | None = None,
        output_hidden_states: bool | None = None, output_attentions: bool | None = None,
        past_key_values: Cache | None = None, **kwargs: Any,
    ) -> BaseModelOutputWithPast:  # fmt: skip
        """Hidden states of the tokens.

        Args:
            input_ids: [batch, tokens]; or `inputs_embeds`, [batch, tokens, hidden_size].
            attention_mask: 1 at valid tokens, [batch, keys, cached ones included].
            position_ids: of the tokens; from the cache and the padding unless given. Where they begin
                anew within a row, with neither a mask nor a cache, the row holds several texts that do
                not see each other, and no cache is made.
            cache: what earlier steps have kept.
            inputs_embeds: instead of `input_ids`.
            use_cache: whether to make a cache where none is given; unless given, as the configuration
                says.
            output_hidden_states: whether to give those between the blocks too.
            output_attentions: whether to give each layer's attention map too.
            past_key_values: the name of `cache` before Transformers 5.24.
            kwargs: whatever Transformers passes on besides.

        Raises:
            ValueError: neither or both of `input_ids` and `inputs_embeds`; two caches; a mask of another
                length; maps of layers that have none.
            TypeError: an argument that the model has no use for.
        """
        check_rest(self, kwargs, position_ids)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give one of input_ids and inputs_embeds")
        h = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = the_cache(cache, past_key_values)
        check_mask(attention_mask, h, cache)
        packing, mask = None, only_padding(attention_mask)
        if attention_mask is None and cache is None and position_ids is not None:
            packing, mask = unpacked(self.layers, position_ids, len(h))
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache = kept_cache(
            self, cache, use_cache and packing is None, lambda: DynamicCache(config=self.config)
        )
        passed = through(
            self.layers, self.norm, h,
            states=asked(self.config, "output_hidden_states", output_hidden_states),
            maps=asked(self.config, "output_attentions", output_attentions),
            mask=mask, position_ids=position_ids, cache=cache, packing=packing,
        )  # fmt: skip
        return BaseModelOutputWithPast(
            last_hidden_state=passed.last,
            hidden_states=passed.hidden_states,
            attentions=passed.attentions,
            **{NAME: cache},
        )


class Decoder(AttlasModel, AttlasGenerationMixin):
    """A causal language model: `forward` gives logits, and a loss where labels are given."""

    config_class = DecoderConfig
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.model = DecoderModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_type = "ForCausalLM"
        self._is_stateful = is_stateful(self.model.layers)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, cache: Cache | None = None,
        inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
        use_cache: bool | None = None, logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None, output_attentions: bool | None = None,
        past_key_values: Cache | None = None, shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None, **kwargs: Any,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """Logits of the next tokens; arguments as in `DecoderModel.forward`, and:

        Args:
            labels: tokens to predict, −100 where none is; shifted here. In training the loss holds
                what the layers add to it.
            logits_to_keep: of how many last tokens, or of which, logits are wanted; 0 for all.
            shift_labels: the labels of each token's successor, where they are shifted already.
            num_items_in_batch: labels of all steps of gradient accumulation; those of this one unless
                given.
        """
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            cache=the_cache(cache, past_key_values), inputs_embeds=inputs_embeds,
            use_cache=use_cache, output_hidden_states=output_hidden_states,
            output_attentions=output_attentions, return_dict=True, **kwargs,
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = None
        if shift_labels is None and labels is not None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:]
        if shift_labels is not None:
            loss = token_loss(logits, shift_labels, self, num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            **{NAME: out.get(NAME)},
        )


AutoConfig.register(DecoderConfig.model_type, DecoderConfig, exist_ok=True)
AutoModel.register(DecoderConfig, DecoderModel, exist_ok=True)
AutoModelForCausalLM.register(DecoderConfig, Decoder, exist_ok=True)
