"""Reading an upstream config.json so that no field is ignored.

A family lists its fields as data: `Field`s that it reads and a mapping of inert names to the reason why each changes
nothing. Whatever is left over, has another type, or contradicts its own alias stops with the field's name and value.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from alibi_hf.errors import ConfigFieldError
from alibi_hf.model.configuration_alibi import LARGEST, MAX_LABELS, AlibiConfig

REQUIRED = object()
INT = (int,)
BOOL = (bool,)
NUMBER = (int, float)
TEXT = (str,)
TOKEN_IDS = (int, list, type(None))
_MAX_INT = 2**31 - 1  # no field of a checkpoint counts further


@dataclass(frozen=True)
class Field:
    """One upstream field.

    Args:
        names: upstream's name, then aliases of it; where several are present they must agree.
        kinds: accepted JSON types; an int passes where a float is accepted.
        default: what upstream takes when the field is absent; `REQUIRED` if its absence is an error.
        to: our config field with the same meaning, "" where the family computes it.
        accept: the only values that can be expressed; empty for any.
        refusal: what to do about a value outside `accept`.
    """

    names: tuple[str, ...]
    kinds: tuple[type, ...]
    default: Any = REQUIRED
    to: str = ""
    accept: tuple[Any, ...] = ()
    refusal: str = ""


# Fields that every config.json of Transformers may hold. Their reason is one sentence each.
_BOOKKEEPING = "describes the file, not the computation"
_OUTPUT = "says what a call returns, not what is computed"
_GENERATION = "a generation default; carried over to generation_config.json"
_LABELS = "carried over as it is"
GENERATION_FIELDS = tuple(
    [
        "max_length",
        "min_length",
        "max_new_tokens",
        "min_new_tokens",
        "do_sample",
        "early_stopping",
        "num_beams",
        "num_beam_groups",
        "diversity_penalty",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "typical_p",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "num_return_sequences",
        "output_scores",
        "return_dict_in_generate",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "remove_invalid_values",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
        "epsilon_cutoff",
        "eta_cutoff",
    ]
)
LABEL_FIELDS = ("id2label", "label2id", "num_labels", "problem_type")
STANDARD_INERT: dict[str, str] = {
    **dict.fromkeys(GENERATION_FIELDS, _GENERATION),
    **dict.fromkeys(LABEL_FIELDS, _LABELS),
    **dict.fromkeys(("torch_dtype", "dtype"), "the dtype of the file; the tensors say theirs"),
    **dict.fromkeys(
        [
            "model_type",
            "architectures",
            "auto_map",
            "_name_or_path",
            "name_or_path",
            "transformers_version",
            "_commit_hash",
            "tokenizer_class",
            "prefix",
            "task_specific_params",
            "finetuning_task",
            "torchscript",
            "use_bfloat16",
            "tf_legacy_loss",
            "_attn_implementation_autoset",
            "_attn_implementation",
            "attn_implementation",
            "base_config_key",
            "chunk_size_feed_forward",
            "use_return_dict",
            "custom_pipelines",
            "_flash_attn_2_enabled",
        ],
        _BOOKKEEPING,
    ),
    **dict.fromkeys(["return_dict", "output_hidden_states", "output_attentions"], _OUTPUT),
    **dict.fromkeys(["unk_token_id", "sep_token_id", "decoder_start_token_id"], "no model of this kind reads it"),
    "is_decoder": "every model of this package is a decoder",
    "use_cache": "a default of calls; this package's is true",
    "gradient_checkpointing": "a setting of training",
    "initializer_range": "only new weights would read it",
}
# Standard fields that are harmless only at these values.
STANDARD_EXPECTED: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False, None),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
}


def read_fields(
    raw: Mapping[str, Any], fields: Sequence[Field], inert: Mapping[str, str], where: str
) -> dict[str, Any]:
    """The values of `fields`, by their first name, after checking that `raw` holds nothing else.

    `where` names the source in messages, such as "bloom" or "mpt attn_config".

    Raises:
        ConfigFieldError: for a field that is not understood, missing, of another type, or of a refused value.
    """
    known = {name for field in fields for name in field.names}
    for name, value in raw.items():
        if name in STANDARD_EXPECTED and name not in known:
            _refuse_unexpected(name, value, where)
        elif name not in known and name not in inert and name not in STANDARD_INERT:
            raise ConfigFieldError(
                f"{where}: the field {name}={value!r} is not understood. If upstream's code does not read it, "
                f"remove it from config.json; otherwise this checkpoint cannot be expressed."
            )
    return {field.names[0]: _read(raw, field, where) for field in fields}


def _refuse_unexpected(name: str, value: Any, where: str) -> None:
    accepted = STANDARD_EXPECTED[name]
    if value not in accepted:
        raise ConfigFieldError(
            f"{where}: {name}={value!r} cannot be expressed; only {accepted[0]!r} can. Use an unquantised, "
            f"decoder-only checkpoint."
        )


def _read(raw: Mapping[str, Any], field: Field, where: str) -> Any:
    present = {name: raw[name] for name in field.names if name in raw}
    values = [value for value in present.values() if value is not None] or list(present.values())
    if not values and field.default is REQUIRED:
        raise ConfigFieldError(f"{where}: the field {field.names[0]} is missing from config.json.")
    if any(isinstance(value, float) and not isfinite(value) for value in values):
        raise ConfigFieldError(f"{where}: {field.names[0]}={values[0]!r} is no finite number.")
    if any(type(value) is int and abs(value) > _MAX_INT for value in values):
        raise ConfigFieldError(f"{where}: {field.names[0]}={values[0]!r} is more than a checkpoint has: {_MAX_INT}.")
    if any(value != values[0] for value in values):
        raise ConfigFieldError(f"{where}: the fields {present} are one field under several names and disagree.")
    value = values[0] if values else field.default
    if values and not (value is None and field.default is None) and not _is_kind(value, field.kinds):
        kinds = ", ".join(kind.__name__ for kind in field.kinds)
        raise ConfigFieldError(f"{where}: {field.names[0]}={value!r} should be of type {kinds}.")
    if field.accept and not any(value == item and type(value) is type(item) for item in field.accept):
        absent = "" if values else " (upstream's default)"
        raise ConfigFieldError(
            f"{where}: {field.names[0]}={value!r}{absent} cannot be expressed; expected "
            f"{' or '.join(repr(item) for item in field.accept)}. {field.refusal}".rstrip()
        )
    return value


def _is_kind(value: Any, kinds: tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, kinds) or (isinstance(value, int) and float in kinds)


def build_config(
    family: str, raw: Mapping[str, Any], fields: Iterable[Field], values: Mapping[str, Any], **more: Any
) -> AlibiConfig:
    """The `AlibiConfig` of `values` mapped through `fields`, with `more` on top and the standard fields carried over.

    Raises:
        ConfigFieldError: where the values contradict each other.
    """
    mapped = {field.to: values[field.names[0]] for field in fields if field.to}
    carried = {name: raw[name] for name in LABEL_FIELDS if raw.get(name) is not None}
    if "id2label" in carried:
        carried.pop("num_labels", None)
    _check_labels(family, carried)
    dtype = raw.get("dtype") or raw.get("torch_dtype")
    if dtype is not None and not isinstance(getattr(torch, str(dtype), None), torch.dtype):
        raise ConfigFieldError(f"{family}: dtype={dtype!r} is no dtype of torch.")
    try:
        return AlibiConfig(**{"dtype": dtype, **carried, **mapped, **more})
    except (StrictDataclassError, AttributeError, TypeError, ValueError) as error:
        raise ConfigFieldError(f"{family}: the fields of config.json cannot be expressed together: {error}") from error


def _check_labels(family: str, carried: Mapping[str, Any]) -> None:
    """Transformers makes a name for each of `num_labels`, and takes `id2label` and `label2id` as they are."""
    kinds = {"num_labels": int, "id2label": dict, "label2id": dict, "problem_type": str}
    for name, value in carried.items():
        number = value if isinstance(value, int) else len(value) if isinstance(value, (dict, str)) else 0
        if type(value) is not kinds[name] or not 0 <= number <= MAX_LABELS:
            raise ConfigFieldError(
                f"{family}: {name}={value!r} should be of type {kinds[name].__name__}, and of at most "
                f"{MAX_LABELS} labels."
            )


def defaults_used(raw: Mapping[str, Any], fields: Iterable[Field]) -> dict[str, Any]:
    """The fields absent from `raw`, with the value upstream's code takes for each; for `conversion.json`."""
    return {field.names[0]: field.default for field in fields if not any(name in raw for name in field.names)}


def need_multiple(width: int, heads: int, where: str) -> int:
    """`width / heads`, the width of one head; `ConfigFieldError` where it is no whole number, or none has as many."""
    if heads > LARGEST["num_attention_heads"]:
        raise ConfigFieldError(
            f"{where}: {heads} heads are more than any checkpoint has: at most {LARGEST['num_attention_heads']}."
        )
    if heads <= 0 or width <= 0 or width % heads:
        raise ConfigFieldError(f"{where}: a width of {width} cannot be shared out among {heads} heads.")
    return width // heads


TOKEN_FIELDS = (
    Field(("pad_token_id",), TOKEN_IDS, default=None, to="pad_token_id"),
    Field(("bos_token_id",), TOKEN_IDS, default=None, to="bos_token_id"),
    Field(("eos_token_id",), TOKEN_IDS, default=None, to="eos_token_id"),
)
TIE_FIELD = Field(("tie_word_embeddings",), BOOL, default=True, to="tie_word_embeddings")

__all__ = [
    "BOOL",
    "GENERATION_FIELDS",
    "INT",
    "LABEL_FIELDS",
    "NUMBER",
    "REQUIRED",
    "TEXT",
    "TIE_FIELD",
    "TOKEN_FIELDS",
    "TOKEN_IDS",
    "Field",
    "build_config",
    "defaults_used",
    "need_multiple",
    "read_fields",
]
