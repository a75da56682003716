"""What a config computes, field by field, so that two configs can be compared and a difference named."""

import math
from typing import Any

from alibi_hf.families._layout import head_sizes
from alibi_hf.model.bias_alibi import alibi_slopes
from alibi_hf.model.configuration_alibi import AlibiConfig

BIASES = ("attention_bias", "attention_out_bias", "mlp_bias", "norm_bias")
TRAINING = ("attention_dropout", "hidden_dropout", "embedding_dropout")  # no inference reads them
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
# Said by `alibi_slopes` of `computed`; checked apart; or no part of what is computed.
_NOT_COMPARED = (
    *TRAINING,
    *TOKENS,
    "alibi",
    "alibi_bias_max",
    "alibi_rounding",
    "attention_window",
    "attention_window_eps",
    "initializer_range",
    "use_cache",
)
_SAME_ACTIVATION = {
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
    "gelu_python": "gelu",
    "swish": "silu",
}


def computed(config: AlibiConfig) -> dict[str, Any]:
    """What a config computes, by field: defaults filled in, slopes as numbers, names of one function made one."""
    names = [name for name in AlibiConfig.__annotations__ if name not in _NOT_COMPARED]
    values = {name: getattr(config, name) for name in names}
    _, _, head_dim = head_sizes(config)
    scale = config.attention_scale
    return values | {
        "attention_scale": head_dim**-0.5 if scale is None else scale,
        "embedding_scale": 1.0 if config.embedding_scale is None else config.embedding_scale,
        "logit_scale": 1.0 if config.logit_scale is None else config.logit_scale,
        "hidden_act": _SAME_ACTIVATION.get(config.hidden_act, config.hidden_act),
        "norm_bias": config.norm_bias and config.norm_type == "layer_norm",
        "alibi_slopes": effective_slopes(config),
    }


def effective_slopes(config: AlibiConfig) -> list[float]:
    """The exact slope of each query head, in float64; zeros without ALiBi."""
    heads = config.num_attention_heads
    if not config.alibi:
        return [0.0] * heads
    return config.alibi_slopes or alibi_slopes(heads, config.alibi_bias_max)


def near(ours: Any, theirs: Any) -> bool:
    """Whether two values are one: numbers and lists of them within float32's rounding."""
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(near, ours, theirs))
    if isinstance(ours, float) or isinstance(theirs, float):
        return ours is not None and theirs is not None and math.isclose(ours, theirs, rel_tol=1e-6)
    return bool(ours == theirs)


def blamed(config: AlibiConfig, name: str) -> str:
    """The field that a difference in `name` comes from, and its value: slopes have three fields."""
    if name == "alibi_slopes" and not config.alibi:
        name = "alibi"
    elif name == "alibi_slopes" and config.alibi_slopes is None:
        name = "alibi_bias_max"
    return f"{name}={shown(getattr(config, name))}"


def shown(value: Any) -> str:
    """The value as messages show it: of a list of slopes the first three."""
    if not isinstance(value, list):
        return repr(value)
    return f"[{', '.join(f'{slope:.6g}' for slope in value[:3])}{', ...' if len(value) > 3 else ''}]"


__all__ = ["BIASES", "TOKENS", "TRAINING", "blamed", "computed", "effective_slopes", "near", "shown"]
