"""Mistral's layout: Llama's without biases. A sliding window cannot be expressed and is refused.

Source: `transformers.models.mistral`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from alibi_hf.errors import ConfigFieldError
from alibi_hf.families._fields import BOOL, Field, read_fields
from alibi_hf.families._reference import Reference
from alibi_hf.model.configuration_alibi import AlibiConfig
from alibi_hf.retrofitting import llama
from alibi_hf.retrofitting.layout import recognised
from alibi_hf.retrofitting.llama import rules

NAMES = ("mistral",)
ROUNDINGS = llama.ROUNDINGS
REFERENCE = "transformers.MistralForCausalLM"
POSITIONS = llama.POSITIONS
_DEFAULTS = {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 4096 * 32}
_NO_BIASES = "Mistral's class has none."

FIELDS = (
    *(
        replace(field, default=_DEFAULTS.get(field.names[0], field.default))
        for field in llama.FIELDS
        if field.kinds != BOOL or field.to == "tie_word_embeddings"
    ),
    Field(("attention_bias",), BOOL, default=False, accept=(False,), refusal=_NO_BIASES),
    Field(("mlp_bias",), BOOL, default=False, accept=(False,), refusal=_NO_BIASES),
    Field(("sliding_window",), (int, type(None)), default=4096),
)
INERT = llama.INERT


def recognise(raw: dict[str, Any], tensor_names: Sequence[str]) -> bool:
    """Whether config and, if there are any, tensor names are Mistral's."""
    return recognised(NAMES, raw, tensor_names, *llama.TENSORS)


def config(raw: dict[str, Any]) -> AlibiConfig:
    """The `AlibiConfig` of a Mistral config.json with ALiBi in it; `ConfigFieldError` for what cannot be expressed."""
    values = read_fields(raw, FIELDS, INERT, "mistral")
    window, length = values["sliding_window"], values["max_position_embeddings"]
    if window is not None and window < length:
        raise ConfigFieldError(
            f"mistral: sliding_window={window} is shorter than max_position_embeddings={length} and cannot be "
            f"expressed: here every layer reads all tokens. If that is what you want to train, set sliding_window to "
            f"null in config.json."
        )
    return llama.llama_config("mistral", raw, FIELDS, values)


def notes(raw: dict[str, Any]) -> list[str]:
    """What became of positions and window, one sentence each."""
    window = read_fields(raw, FIELDS, INERT, "mistral")["sliding_window"]
    kept = [] if window is None else [f"sliding_window={window} is dropped: here every layer reads all tokens"]
    return llama.notes(raw) + kept


def reference(config: AlibiConfig) -> Reference:
    """`MistralForCausalLM`, whose queries and keys are turned by no angle where every position is zero."""
    return replace(llama.reference(config), class_name=REFERENCE)


__all__ = ["NAMES", "config", "notes", "recognise", "reference", "rules"]
