"""What llama.cpp's ALiBi architectures compute, and which of them is a given model.

GGUF names an architecture, and llama.cpp builds that architecture's graph, whatever else the file says. So a model is
written as the first architecture whose graph computes it. Three differences are made good in the weights: a missing
bias is a bias of zeros; factors on embeddings and logits go into those matrices; a factor on the scores goes into the
queries (exact where it is a power of two).

Sources: llama.cpp, `src/models/{bloom,mpt,jais,baichuan,refact}.cpp`, `src/llama-graph.cpp` (`build_qkv`, `build_ffn`,
`build_attn_mha`), and its slopes in `ggml/src/ggml-cpu/ops.cpp` (`ggml_compute_forward_soft_max`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from alibi_hf.checkpoints.export_compare import BIASES, blamed, computed, effective_slopes, near
from alibi_hf.checkpoints.export_source import EMBEDDING, HEAD
from alibi_hf.checkpoints.rules import Rule, Split
from alibi_hf.errors import ConfigFieldError
from alibi_hf.families._layout import head_sizes, parameter_rules
from alibi_hf.model.bias_alibi import alibi_slopes
from alibi_hf.model.configuration_alibi import AlibiConfig

_TANH_GELU = ("gelu_pytorch_tanh", "gelu")  # ggml has the tanh form, from a float16 table, for both
_SLOPE_ROUNDING = 2e-6  # slopes made in float32 differ by less from the formula
_QUERY = "model.layers.{i}.self_attn.q_proj"
_KIND = ("norm_type", "embedding_norm", "mlp_type")  # architectures that agree in these are worth naming
# What no graph of these has, by the field's value that means "not there".
_NEVER = {
    "residual_from_norm": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "alibi_distance": "linear",
    "alibi_scaling": None,
    "rope_parameters": None,
    "learned_positions": False,
    "sinusoidal_positions": False,
    "qk_norm": None,  # mpt's has it, but aborts there: it reshapes queries and keys that are not contiguous
}


def _inverse_root(head_dim: int) -> float:
    return head_dim**-0.5


def _inverse(head_dim: int) -> float:
    return 1 / head_dim


@dataclass(frozen=True)
class Architecture:
    """One graph of llama.cpp.

    Attributes:
        name: GGUF's name of it.
        accepts: the values of our fields that the graph computes, of those fields that it does not leave free.
        pads: biases that the graph needs: zeros where the model has none.
        bias_max: the one value the graph has, or None where the file says it.
        scale: the factor on the scores, by the width of a head.
        layers: the number of layers at which the graph has ALiBi at all; None for any.
        free_head_dim: whether heads may be together wider or narrower than the residual stream.
        needs_output: whether a tied head has to be written again.
        fused: whether queries, keys and values are one tensor.
    """

    name: str
    accepts: dict[str, tuple[Any, ...]]
    pads: tuple[str, ...] = ()
    bias_max: float | None = 8.0
    scale: Callable[[int], float] = _inverse_root
    layers: int | None = None
    free_head_dim: bool = False
    needs_output: bool = False
    fused: bool = True

    def problem(self, config: AlibiConfig) -> str | None:
        """What of `config` the graph does not compute, in words that name the field; None where it computes it all."""
        values = computed(config)
        for name, accepted in {**{name: (value,) for name, value in _NEVER.items()}, **self.accepts}.items():
            if values[name] not in accepted:
                return f"{blamed(config, name)}: its graph computes {' or '.join(map(repr, accepted))}"
        heads, _, head_dim = head_sizes(config)
        if heads * head_dim != config.hidden_size and not self.free_head_dim:
            return f"head_dim={head_dim}: its graph computes hidden_size / num_attention_heads"
        if self.layers not in (None, config.num_hidden_layers):
            return f"num_hidden_layers={config.num_hidden_layers}: its graph has ALiBi at {self.layers} layers only"
        return self._scale_problem(config) or self._slopes_problem(config)

    def _scale_problem(self, config: AlibiConfig) -> str | None:
        if self.score_factor(config) != 1.0 and config.clip_qkv is not None:
            return f"attention_scale={config.attention_scale} with clip_qkv={config.clip_qkv}: its graph has one scale"
        return None

    def _slopes_problem(self, config: AlibiConfig) -> str | None:
        maximum, error = nearest_bias_max(config)
        if error > _SLOPE_ROUNDING:
            accept = f" (set alibi_slopes to null and alibi_bias_max to {maximum:g} to accept that)"
            return (
                f"{blamed(config, 'alibi_slopes')}: a file holds alibi_bias_max only, and the nearest, {maximum:g}, "
                f"changes a slope by {error:.2g} of it{accept if error < 0.01 else ''}"
            )
        if self.bias_max is not None and not near(maximum, self.bias_max):
            return f"{blamed(config, 'alibi_slopes')}: its graph computes alibi_bias_max={self.bias_max:g}"
        return None

    def score_factor(self, config: AlibiConfig) -> float:
        """What the queries are multiplied by so that the graph's scores are the model's; 1.0 for nothing."""
        head_dim = head_sizes(config)[2]
        factor = computed(config)["attention_scale"] / self.scale(head_dim)
        return 1.0 if near(factor, 1.0) else factor

    def factors(self, config: AlibiConfig) -> dict[str, float]:
        """What values are multiplied by, by the pattern of our names."""
        values = computed(config)
        found = {EMBEDDING: values["embedding_scale"], HEAD: values["logit_scale"]}
        return found | {f"{_QUERY}.{part}": self.score_factor(config) for part in ("weight", "bias")}

    def padded(self, config: AlibiConfig) -> list[str]:
        """The biases that the graph needs and the model lacks."""
        return [name for name in self.pads if not computed(config)[name]]


def nearest_bias_max(config: AlibiConfig) -> tuple[float, float]:
    """The `alibi_bias_max` that fits the model's slopes, and the largest relative difference it makes to one."""
    if not config.alibi:
        return 0.0, 0.0
    if config.alibi_slopes is None:
        return float(config.alibi_bias_max), 0.0
    slopes, heads = effective_slopes(config), config.num_attention_heads
    if min(slopes) <= 0:
        return 0.0, 1.0
    maximum = -math.log2(slopes[0]) * (1 << (heads.bit_length() - 1))
    if abs(maximum - round(maximum)) < 0.05:  # what made the slopes was a whole number; what is left is rounding
        maximum = float(round(maximum))
    return maximum, max(abs(a / b - 1) for a, b in zip(slopes, alibi_slopes(heads, maximum), strict=True))


def choose_architecture(config: AlibiConfig) -> Architecture:
    """The first of `ARCHITECTURES` that computes `config`.

    Raises:
        ConfigFieldError: where none does, with the first field in the way of each that has the model's norm and MLP.
    """
    if config.alibi_rounding != "exact":
        raise ConfigFieldError(
            f"gguf cannot hold alibi_rounding={config.alibi_rounding!r}: llama.cpp computes the bias in float32. Set "
            f"alibi_rounding to 'exact' in config.json."
        )
    problems = {architecture.name: architecture.problem(config) for architecture in ARCHITECTURES}
    for architecture in ARCHITECTURES:
        if problems[architecture.name] is None:
            return architecture
    values = computed(config)
    alike = [a.name for a in ARCHITECTURES if all(values[name] in a.accepts[name] for name in _KIND)]
    shown = "; ".join(f"{name} cannot hold {problems[name]}" for name in alike or problems)
    raise ConfigFieldError(f"gguf cannot hold this model. Of llama.cpp's architectures with ALiBi, {shown}.")


def gguf_rules(config: AlibiConfig, architecture: Architecture) -> list[Rule]:
    """Every tensor of the GGUF file and what becomes of it in our model with `config`, padded biases included."""
    blk, ours = "blk.{i}.", "model.layers.{i}."
    heads, kv_heads, head_dim = head_sizes(config)
    rows = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
    values = computed(config)
    norm, scaled = values["norm_bias"], values["embedding_scale"] != values["logit_scale"]
    modules = [
        ("token_embd", "model.embed_tokens", False),
        ("output_norm", "model.norm", norm),
        (f"{blk}attn_norm", f"{ours}input_layernorm", norm),
        (f"{blk}attn_output", f"{ours}self_attn.o_proj", config.attention_out_bias),
        (f"{blk}ffn_norm", f"{ours}post_attention_layernorm", norm),
        (f"{blk}ffn_up", f"{ours}mlp.up_proj", config.mlp_bias),
        (f"{blk}ffn_down", f"{ours}mlp.down_proj", config.mlp_bias),
    ]
    if config.embedding_norm:
        modules.append(("token_embd_norm", "model.embed_norm", norm))
    if config.mlp_type == "gated":
        modules.append((f"{blk}ffn_gate", f"{ours}mlp.gate_proj", config.mlp_bias))
    # llama.cpp ties a head that is not there to token_embd, which has the embedding's factor in it.
    if not config.tie_word_embeddings or architecture.needs_output or scaled:
        modules.append(("output", "lm_head", False))
    if not architecture.fused:
        modules += [(f"{blk}attn_{part}", f"{ours}self_attn.{part}_proj", config.attention_bias) for part in "qkv"]
    found = [rule for names in modules for rule in parameter_rules(*names[:2], bias=names[2])]
    if architecture.fused:
        fused = [f"{ours}self_attn.{part}_proj" for part in "qkv"]
        found += parameter_rules(f"{blk}attn_qkv", fused, bias=config.attention_bias, operation=Split(rows))
    return found


# Fields that are not listed may have any value.
_LAYER_NORM = {"norm_type": ("layer_norm",)}
_PLAIN = {"mlp_type": ("plain",), "hidden_act": _TANH_GELU}
_GATED = {"mlp_type": ("gated",), "hidden_act": ("silu",)}
_BARE = {"embedding_norm": (False,), "clip_qkv": (None,)}
_RMS = {"norm_type": ("rms_norm",), **dict.fromkeys(BIASES[:3], (False,)), **_GATED, **_BARE}
ARCHITECTURES = (
    Architecture("bloom", {**_LAYER_NORM, **_PLAIN, **_BARE, "embedding_norm": (True,)}, pads=BIASES),
    Architecture("mpt", {**_LAYER_NORM, **_PLAIN, "embedding_norm": (False,)}, bias_max=None),
    Architecture(
        "jais", {**_LAYER_NORM, **_GATED, **_BARE}, pads=BIASES, bias_max=None, scale=_inverse, needs_output=True
    ),
    Architecture("baichuan", _RMS, layers=40, needs_output=True, fused=False),
    Architecture("refact", _RMS, free_head_dim=True, fused=False),
)

__all__ = ["ARCHITECTURES", "Architecture", "choose_architecture", "gguf_rules", "nearest_bias_max"]
