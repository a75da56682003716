"""The ALiBi decoder and its heads: causal language modelling, sequence and token classification, question answering.

* One decoder for every family: what differs between them is in `AlibiConfig`, and is built once.
* No ceiling on length, no position embeddings, no buffers: positions exist only as the `Distances` of a call. Learned
  positions, for comparison, are the exception to the first two.
* Packed documents (position_ids that restart), padding anywhere, any cache and any chunking give the same answer.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.distributed.pipeline_parallel import PipelineIdentityLayer
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_alibi import is_flash
from .bias_alibi import Distances
from .cache_alibi import grow, make_cache
from .configuration_alibi import AlibiConfig
from .dense_alibi import soft_cap
from .encodings_alibi import changes_with_length, embed_learned, embed_sinusoidal, make_rotation, query_positions
from .layers_alibi import AlibiDecoderLayer, make_norm
from .loss_alibi import AlibiHead, can_chunk, check_label_shape, check_labels
from .positions_alibi import find_documents, is_tracing, make_distances, make_paged_distances
from .pretrained_alibi import AlibiPreTrainedModel

logger = logging.get_logger(__name__)


class AlibiModel(AlibiPreTrainedModel):
    """The decoder without a head: hidden states after the last norm."""

    def __init__(self, config: AlibiConfig) -> None:
        super().__init__(config)
        config.validate_rope()  # `from_pretrained(..., rope_parameters=...)` sets the field without
        self.vocab_size = config.vocab_size
        # No padding_idx: where the padding token is also the end token, as in GPT-2's vocabulary, it has to learn.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.learned_positions:
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.embed_norm = make_norm(config) if config.embedding_norm else nn.Identity()
        self.embed_dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList([AlibiDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = make_norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return the hidden states `[batch, tokens, hidden]` and the cache.

        Args:
            input_ids: `[batch, tokens]`; or `inputs_embeds`: `[batch, tokens, hidden]`, exactly one of the two.
            attention_mask: `[batch, cached + tokens]`, nonzero where a token counts, or a 4-D mask
                `[batch or 1, heads or 1, tokens, cached + tokens]`, bool (True: visible) or float (added). A token that
                a 2-D mask masks reads nothing either: its attention output is zero.
            position_ids: `[batch or 1, tokens]`; only where they step by something other than +1 do they matter: a new
                document starts there. With a 4-D mask and one entry a key they are the positions.
            past_key_values: a Transformers cache; `use_cache` makes one if there is none. In training with activation
                checkpointing, which would drop what it holds, a filled one is a ValueError.

        Raises:
            ValueError: both or none of input_ids and inputs_embeds; no tokens; a mask shorter than cache and tokens;
                documents packed in one row together with a cache; bounds of documents that do not fit the tokens;
                a position past the table of learned positions; a custom mask over texts so long that the kind of RoPE
                depends on their lengths.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if not is_tracing() and hidden_states.numel() == 0:
            raise ValueError(f"The input has no tokens: its shape is {tuple(hidden_states.shape[:2])}.")
        if kwargs.get("cache") is not None:
            distances = make_paged_distances(self.config, hidden_states, kwargs, attention_mask)
        else:
            distances, past_key_values = self._distances(
                hidden_states, attention_mask, position_ids, past_key_values, use_cache, kwargs
            )
        if type(next(iter(self.layers), None)) is not PipelineIdentityLayer:  # else an earlier stage has done it
            hidden_states = self._embed(hidden_states, distances)
        distances.rotation = make_rotation(self.config, distances, hidden_states.dtype)
        for layer in self.layers:
            hidden_states = layer(hidden_states, distances=distances, past_key_values=past_key_values, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _first_layer(self) -> int:
        """Return the index of the first layer that this pipeline stage holds; 0 where there are no stages."""
        return next((index for index, layer in enumerate(self.layers) if hasattr(layer, "self_attn")), 0)

    def _embed(self, embeds: torch.Tensor, distances: Distances) -> torch.Tensor:
        """Scale the embeddings `[batch, tokens, hidden]`, add those of positions, norm and drop out."""
        if self.config.embedding_scale is not None:
            embeds = embeds * self.config.embedding_scale
        if self.config.learned_positions:
            embeds = embeds + embed_learned(self.embed_positions, distances)
        elif self.config.sinusoidal_positions:
            positions = embed_sinusoidal(query_positions(distances), embeds.shape[-1], embeds.dtype)
            embeds = (embeds + positions).to(embeds.dtype)
        return self.embed_dropout(self.embed_norm(embeds))

    def _distances(
        self,
        embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        past_key_values: Cache | None,
        use_cache: bool | None,
        kwargs: dict[str, Any],
    ) -> tuple[Distances, Cache | None]:
        """Return the distances of this call and the cache to use; packed documents get none."""
        batch, queries, _ = embeds.shape
        if self.gradient_checkpointing and self.training and past_key_values is not None:
            self._refuse_dropped_keys(past_key_values)
        documents = find_documents(position_ids, attention_mask, batch, queries, past_key_values, kwargs)
        if use_cache and past_key_values is None and documents is None:
            past_key_values = make_cache(self.config)
        elif use_cache and documents is not None and not is_tracing():
            logger.warning_once("Several documents are packed in one row: no past_key_values are returned for them.")
        distances = make_distances(
            self.config, embeds, attention_mask, position_ids, documents, past_key_values, self._first_layer()
        )
        self._note_length(distances)
        return distances, past_key_values

    def _refuse_dropped_keys(self, past_key_values: Cache) -> None:
        """Transformers drops the cache in checkpointed layers, and with it the virtual tokens of prefix tuning."""
        if held := int(past_key_values.get_seq_length()):
            raise ValueError(
                f"past_key_values hold {held} tokens, which activation checkpointing would drop; switch checkpointing "
                "off (prefix tuning needs that), or pass no cache."
            )

    def _note_length(self, distances: Distances) -> None:
        if not is_tracing() and isinstance(distances.offset, int):
            length, trained = distances.offset + distances.query_index.numel(), self.config.max_position_embeddings
            if length > trained:
                alone = self.config.alibi and not (self.config.rope_parameters or self.config.sinusoidal_positions)
                logger.warning_once(
                    f"Reading past the training length of {trained} tokens: allowed, "
                    + ("ALiBi is made for it." if alone else "but what it reads there may be read worse.")
                )


class AlibiForCausalLM(AlibiPreTrainedModel, GenerationMixin):
    """The decoder with a language modelling head."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan: ClassVar[dict[str, str]] = {"lm_head": "colwise_gather_output"}
    _pp_plan: ClassVar[dict[str, tuple[list[str], list[str]]]] = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan: ClassVar[dict[str, str]] = {"lm_head": "keep_full_weight"}

    def __init__(self, config: AlibiConfig) -> None:
        super().__init__(config)
        self.model = AlibiModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = AlibiHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Set the head; a plain linear layer, such as resizing the vocabulary makes, becomes one of our kind."""
        if type(new_embeddings) is nn.Linear:
            new_embeddings.__class__ = AlibiHead
        super().set_output_embeddings(new_embeddings)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Start from a growing cache unless the caller passes a cache, or names one (`cache_implementation`)."""
        given = model_kwargs.get("past_key_values")
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        made = model_kwargs.get("past_key_values")
        if given is None and made is not None and generation_config.cache_implementation is None:
            model_kwargs["past_key_values"] = grow(made)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Start continuous batching, which `generate_batch` does too.

        Raises:
            ValueError: with flash attention, whose paged cache is not read here; RoPE that changes with the length.
        """
        rope = self.config.rope_parameters
        if rope is not None and changes_with_length(self.config):
            raise ValueError(
                f"generate_batch keeps rotated keys, and rope_type={rope['rope_type']!r} rotates all keys anew as a "
                "text grows; call generate, or use another rope_type."
            )
        if is_flash(self.config._attn_implementation):
            raise ValueError(
                f"{self.config._attn_implementation} cannot serve generate_batch; call "
                "set_attn_implementation('sdpa') first, or 'eager'."
            )
        return super().init_continuous_batching(*args, **kwargs)

    def create_masks_for_generate(
        self, config: Any, inputs_embeds: Any, attention_mask: Any, past_key_values: Cache, **kwargs: Any
    ) -> Any:
        """Keep the 2-D mask that distances are counted on, padded to a static cache's length: shapes stay fixed."""
        if attention_mask is None or attention_mask.dim() == 4:
            return attention_mask
        missing = past_key_values.get_mask_sizes(1, 0)[0] - attention_mask.shape[-1]
        return nn.functional.pad(attention_mask, (0, missing)) if missing > 0 else attention_mask

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits `[batch, kept tokens, vocab]`, and the loss where `labels` `[batch, tokens]` are given.

        Labels are shifted inside; -100 is ignored. `logits_to_keep` is a number of last tokens (0: all) or indices. The
        other arguments are those of [`AlibiModel`], and those of Transformers' `ForCausalLMLoss`.

        `skip_logits=True` returns the loss alone, logits None, and computes it chunk by chunk of tokens: the memory of
        all logits is not needed (see [`chunked_loss`]). None, the default, means True in a training step of `Trainer`,
        which reads no logits there: in training mode, with labels, gradients and `num_items_in_batch`. Where the head
        is wrapped, hooked, quantised or split by tensor parallelism, `loss_function` is one's own, or a compiler
        traces, logits are None too, but the loss is computed from all of them.

        Raises:
            ValueError: labels of another shape than the tokens; a label outside the vocabulary (where labels are on
                CPU); skip_logits without labels.
        """
        if skip_logits is None:
            counted = labels is not None and kwargs.get("num_items_in_batch") is not None
            skip_logits = counted and self.training and torch.is_grad_enabled()
        if skip_logits and labels is None:
            raise ValueError("skip_logits=True returns the loss alone, and labels are None; give labels.")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        loss, logits = self._loss_and_logits(outputs.last_hidden_state[:, keep], labels, skip_logits, kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _loss_and_logits(
        self, hidden_states: torch.Tensor, labels: torch.Tensor | None, skip_logits: bool, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        config, head, loss = self.config, self.lm_head, None
        scale, cap = config.logit_scale, config.final_logit_softcapping
        if labels is not None:
            check_labels(labels, hidden_states.shape[:2], config.vocab_size, **kwargs)
            if skip_logits and can_chunk(head, hidden_states, self.loss_function):
                return head(hidden_states, labels=labels, logit_scale=scale, softcap=cap, **kwargs), None
        logits = head(hidden_states)
        if scale is not None:
            logits = logits * scale
        logits = soft_cap(logits, cap)
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=config.vocab_size, **kwargs)
        return loss, None if skip_logits else logits


class AlibiForSequenceClassification(AlibiPreTrainedModel):
    """The decoder with a classifier on the last token of each row that is not padding."""

    def __init__(self, config: AlibiConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = AlibiModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Return logits `[batch, num_labels]`, and the loss where `labels` are given.

        Labels are `[batch]`, or `[batch, num_labels]` for several labels or numbers at once. The loss is their mean, or
        with `num_items_in_batch`, as Trainer passes it when it accumulates gradients, their sum over that number.
        """
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        last = self._last_tokens(outputs.last_hidden_state, input_ids, attention_mask)
        rows = torch.arange(last.shape[0], device=last.device)
        logits = self.score(outputs.last_hidden_state[rows, last])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=None, pooled_logits=logits, labels=labels, config=self.config, **kwargs)
            items = kwargs.get("num_items_in_batch")
            if items is not None and self.config.problem_type != "single_label_classification":
                loss = loss * labels.numel() / items  # these losses are means over the rows of this call
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _last_tokens(
        self, hidden_states: torch.Tensor, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the index of each row's last token that is neither masked nor `pad_token_id`, `[batch]`."""
        batch, tokens, _ = hidden_states.shape
        real = torch.ones(batch, tokens, dtype=torch.bool, device=hidden_states.device)
        mask = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
        if mask is not None:
            real &= mask[:, -tokens:].to(real.device, torch.bool)
        if self.config.pad_token_id is not None and input_ids is not None:
            real &= input_ids.to(real.device) != self.config.pad_token_id
        elif batch > 1 and mask is None:
            raise ValueError(
                f"{batch} rows, but nothing says where each ends: pass attention_mask, or set config.pad_token_id "
                "and pass input_ids."
            )
        return (torch.arange(tokens, device=real.device) * real).argmax(-1)


class AlibiForTokenClassification(AlibiPreTrainedModel):
    """The decoder with a classifier on every token."""

    def __init__(self, config: AlibiConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = AlibiModel(config)
        rate = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(config.hidden_dropout if rate is None else rate)
        self.score = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Return logits `[batch, tokens, num_labels]`, and the loss where `labels` `[batch, tokens]` are given.

        Labels of -100 are ignored. The loss is a mean, or with `num_items_in_batch`, as Trainer passes it when it
        accumulates gradients, the sum over that number.
        """
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        if labels is not None:
            check_label_shape(labels, outputs.last_hidden_state.shape[:2])
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = self.loss_function(logits, labels, self.config, **kwargs) if labels is not None else None
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class AlibiForQuestionAnswering(AlibiPreTrainedModel):
    """The decoder with a start and an end score on every token."""

    def __init__(self, config: AlibiConfig) -> None:
        super().__init__(config)
        self.model = AlibiModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:
        """Return start and end logits `[batch, tokens]`, and the loss where both positions `[batch]` are given."""
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions, **kwargs)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


# Trainer's label smoothing shifts labels for the classes of this table alone, which registering does not fill.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(AlibiConfig.model_type, AlibiForCausalLM.__name__)

__all__ = [
    "AlibiForCausalLM",
    "AlibiForQuestionAnswering",
    "AlibiForSequenceClassification",
    "AlibiForTokenClassification",
    "AlibiModel",
    "AlibiPreTrainedModel",
]
