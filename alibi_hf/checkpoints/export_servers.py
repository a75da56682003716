"""What vLLM, TGI and CTranslate2 leave out of an exported config, or refuse: notes for whoever serves it there.

Read in their sources, not run: vLLM, `model_executor/models/{bloom,mpt,falcon}.py`; TGI,
`custom_modeling/{bloom,mpt}_modeling.py`; CTranslate2, `converters/transformers.py`.
"""

import math
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import MptConfig

from alibi_hf.model.configuration_alibi import AlibiConfig


@dataclass(frozen=True)
class Gap:
    """A field of an upstream config that a server serves at some values only.

    Attributes:
        server: who; several are joined by "and".
        ignores: whether it computes as if the field had one of `serves`; else it stops.
        field: its name, with dots where it is nested.
        serves: these values; None stands for an absent field too.
        beside: another field without which there is no gap.
    """

    server: str
    ignores: bool
    field: str
    serves: tuple[Any, ...] = (None,)
    beside: str | None = None

    def note(self, raw: dict[str, Any]) -> str | None:
        """What to know about `raw`, an upstream config.json; None where the server serves it."""
        value = _value(raw, self.field)
        if value in self.serves or (self.beside is not None and _value(raw, self.beside) is None):
            return None
        if self.ignores:
            return f"{self.server} would ignore {self.field}={value!r} and compute another model"
        return f"{self.server} cannot load {self.field}={value!r}"


def _value(raw: dict[str, Any], field: str) -> Any:
    value: Any = raw
    for name in field.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


_BOTH = "vLLM and TGI"
_OFF = (None, False)
_ON = (None, True)
_MPT = (
    Gap(_BOTH, False, "norm_type", (None, "low_precision_layernorm")),
    Gap("vLLM, TGI and CTranslate2", True, "layer_norm_epsilon", (None, 1e-5)),
    Gap("vLLM, TGI and CTranslate2", True, "norm_eps", (None, 1e-5)),
    Gap(_BOTH, False, "tie_word_embeddings", _ON),
    Gap(_BOTH, False, "attn_config.fused_qkv", _ON),
    Gap(_BOTH, False, "fuse_norm_attn_norm", _OFF),
    Gap(_BOTH, True, "ffn_config"),
    Gap(_BOTH, True, "attn_config.qk_gn", _OFF),
    Gap(_BOTH, True, "attn_config.attn_logit_softcapping"),
    Gap(_BOTH, True, "final_logit_softcapping"),
    Gap("vLLM and CTranslate2", True, "logit_scale"),
    Gap("vLLM", False, "attn_config.qk_ln", _OFF, beside="attn_config.kv_n_heads"),
    Gap("vLLM", False, "head_dim"),
    Gap("TGI", False, "attn_config.qk_ln", _OFF),
    Gap("TGI", False, "attn_config.attn_type", (None, "multihead_attention")),
    Gap("TGI", False, "no_bias", _ON),
    Gap("CTranslate2", True, "attn_config.alibi_bias_max", (None, 8)),
    Gap("CTranslate2", True, "attn_config.clip_qkv"),
)
GAPS: dict[str, tuple[Gap, ...]] = {
    "bloom": (Gap(_BOTH, True, "tie_word_embeddings", _ON),),
    "mpt": _MPT,
    "llm-foundry": _MPT,
    "falcon": (Gap("vLLM", True, "activation", (None, "gelu")),),
}


def server_notes(to: str, raw: dict[str, Any], mapped: AlibiConfig) -> list[str]:
    """What a reader should know before serving `raw`, the config.json of target `to`, one sentence each.

    Args:
        mapped: our config of what `raw` says.
    """
    found = [gap.note(raw) for gap in GAPS[to]]
    if to == "falcon":
        found += [_falcon_width(mapped)]
    elif to != "bloom":
        found += [_mpt_scale(raw, mapped), _native_mpt(raw)]
    return [note for note in found if note is not None]


def _falcon_width(mapped: AlibiConfig) -> str | None:
    if mapped.intermediate_size == 4 * mapped.hidden_size:
        return None
    return f"vLLM cannot load ffn_hidden_size={mapped.intermediate_size}: it has 4 times the width only"


def _mpt_scale(raw: dict[str, Any], mapped: AlibiConfig) -> str | None:
    usual = (mapped.hidden_size / mapped.num_attention_heads) ** -0.5
    if math.isclose(mapped.attention_scale or usual, usual, rel_tol=1e-6):
        return None
    return Gap("vLLM and CTranslate2", True, "attn_config.softmax_scale").note(raw)


def _native_mpt(raw: dict[str, Any]) -> str | None:
    try:
        MptConfig(**raw)
    except (StrictDataclassError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())
        return f"vLLM cannot load it: it reads MPT's config.json with Transformers, which says {said}"
    return None


__all__ = ["GAPS", "Gap", "server_notes"]
