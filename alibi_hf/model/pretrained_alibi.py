"""What all ALiBi models share: loading, the choice of an attention backend, and what they declare to Transformers."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging
from transformers.utils.loading_report import log_state_dict_report

from .attention_alibi import is_flash, resolve_attention
from .configuration_alibi import AlibiConfig
from .layers_alibi import AlibiAttention, AlibiDecoderLayer

logger = logging.get_logger(__name__)
NEW_HEADS = ("lm_head.", "score.", "qa_outputs.")  # what fine-tuning may start from nothing


def check_heads(config: AlibiConfig, tp_size: int) -> None:
    """Raise ValueError where `tp_size` processes cannot each hold whole heads and all that their norms read."""
    heads, shared = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    if heads % tp_size or shared % tp_size:
        sizes = [size for size in range(1, shared + 1) if heads % size == 0 == shared % size]
        raise ValueError(
            f"tp_size={tp_size} does not divide num_attention_heads={heads} and num_key_value_heads={shared}: each "
            f"process needs whole heads. Use a tp_size of {sizes}, and FSDP (fsdp_size) over the other processes."
        )
    if tp_size > 1 and config.qk_norm == "full":
        raise ValueError(
            f"tp_size={tp_size} with qk_norm='full': its norm is over all {heads} heads together, and a process holds "
            f"{heads // tp_size}. Use FSDP (fsdp_size={tp_size}) instead."
        )


def _refuse_missing(model: Any, missing: Any) -> None:
    """Raise ValueError where a tensor is missing outside a new head: it would be random."""
    saved = type(model).__name__ in (model.config.architectures or [])  # the folder holds this very head
    trained = sorted(name for name in missing if saved or not name.startswith(NEW_HEADS))
    if trained:
        raise ValueError(
            f"{model.name_or_path} lacks {len(trained)} tensors that {type(model).__name__} needs, such as "
            f"{trained[0]}; its weights are incomplete, or config.json belongs to another checkpoint."
        )


class AlibiPreTrainedModel(PreTrainedModel):
    """What all ALiBi models share: loading, initialisation, and what they declare to Transformers."""

    config_class = AlibiConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["AlibiDecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = False  # the stock path would drop the slopes
    _supports_context_parallel = False  # it strips the mask
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs: ClassVar[dict[str, type]] = {"hidden_states": AlibiDecoderLayer, "attentions": AlibiAttention}

    foreign_loader: Any = None
    """Set by the installed `alibi_hf` package: loads a folder in an upstream layout, or returns None for our own."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a folder or Hub id in this model's layout; with `alibi_hf` installed, in an upstream layout too.

        Of safetensors, unless `use_safetensors=False` asks for pickles.

        Raises:
            ValueError: where a tensor outside a new head is missing: it would be random.
        """
        if cls.foreign_loader is not None:
            model = cls.foreign_loader(cls, pretrained_model_name_or_path, *args, **kwargs)
            if model is not None:
                return model
        wants_info = kwargs.pop("output_loading_info", False)
        if kwargs.get("use_safetensors") is None and kwargs.get("gguf_file") is None:
            kwargs["use_safetensors"] = True
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        _refuse_missing(model, info["missing_keys"])
        return (model, info) if wants_info else model

    @staticmethod
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        """Refuse what does not fit before Transformers makes memory for it, as large as config.json says.

        Raises:
            ValueError: where a tensor outside a new head is missing.
            RuntimeError: Transformers' own, where one has another shape than the config gives.
        """
        _refuse_missing(model, loading_info.missing_keys - model.all_tied_weights_keys.keys())
        if loading_info.mismatched_keys and not load_config.ignore_mismatched_sizes:
            log_state_dict_report(model, load_config.pretrained_model_name_or_path, False, loading_info, logger)
        return PreTrainedModel._finalize_model_loading(model, load_config, loading_info)

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Shard an empty model over processes, before its weights are read.

        Raises:
            ValueError: where tensor parallelism would cut a head apart, or normalise over heads of other processes.
        """
        if distributed_config is not None and distributed_config.tp_plan in (None, "auto"):
            check_heads(model.config, distributed_config.tp_size or 1)
        return super().maybe_distribute_model(model, distributed_config, *args, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save as ever, with the code files of this model: FSDP makes its class one of torch's, with torch's files."""
        self.__module__ = self._own_class().__module__  # where Transformers looks for them
        super().save_pretrained(*args, **kwargs)

    def _get_name(self) -> str:
        """Return the name that Trainer knows: its label smoothing shifts no labels for the class that FSDP makes."""
        return self._own_class().__name__

    def _own_class(self) -> type:
        return next(cls for cls in type(self).__mro__ if not cls.__module__.startswith("torch."))

    def get_correct_attn_implementation(self, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        """Return the backend that runs; refuse what cannot compute this config's attention.

        Raises:
            ValueError: naming the backend, and those that can.
        """
        device = next((parameter.device.type for parameter in self.parameters()), "meta")
        if device == "meta":  # not loaded yet
            device = "cuda" if torch.cuda.is_available() else "cpu"
        name = resolve_attention(requested_attention, self.config, device)
        if name == "flash_attention_2":
            return name  # Transformers' own check asks whether its path, which drops the slopes, is supported
        return super().get_correct_attn_implementation(name, *args, **kwargs)

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, is_init_check: bool = False, *args: Any, **kwargs: Any
    ) -> str:
        """Keep Transformers from importing or downloading an attention kernel: what runs is decided above."""
        if is_flash(attn_implementation) or "/" in (attn_implementation or ""):
            return self.get_correct_attn_implementation(attn_implementation, is_init_check)
        return super()._check_and_adjust_attn_implementation(attn_implementation, is_init_check, *args, **kwargs)

    def _can_set_attn_implementation(self) -> bool:
        return True  # the class that calls the interface lives in a file beside this one
