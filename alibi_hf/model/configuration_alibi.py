"""`AlibiConfig`: one configuration for every decoder with ALiBi positions.

* Field names are Transformers' standard ones; every upstream family is expressed by these fields alone.
* Slopes are never stored unless `alibi_slopes` says so: they follow from `num_attention_heads` and `alibi_bias_max`.
* `max_position_embeddings` is the length the model was trained at: information, never a ceiling.
* A saved configuration names all six Auto classes: any head loads from the folder with `trust_remote_code=True`.

ALiBi: Press, Smith and Lewis, "Train Short, Test Long", arXiv:2108.12409.
"""

import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import transformers
from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

from .bias_alibi import alibi_slopes
from .encodings_alibi import rope_frequencies, rope_types

AUTO_MAP = {
    "AutoConfig": "configuration_alibi.AlibiConfig",
    "AutoModel": "modeling_alibi.AlibiModel",
    "AutoModelForCausalLM": "modeling_alibi.AlibiForCausalLM",
    "AutoModelForSequenceClassification": "modeling_alibi.AlibiForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_alibi.AlibiForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_alibi.AlibiForQuestionAnswering",
}

# More than any decoder has. A config beyond is refused before anything is made of it: lists of slopes, layers, tables.
LARGEST = {
    "vocab_size": 2**26,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_hidden_layers": 2**10,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "head_dim": 2**16,
    "max_position_embeddings": 2**31 - 1,
}
MAX_LABELS = 2**16
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # that torch makes a model in

# Older places of what is in `rope_parameters`, which Transformers would read and then drop.
ROPE_ELSEWHERE = ("rope_theta", "rope_scaling", "partial_rotary_factor")


@strict
class AlibiConfig(PreTrainedConfig):
    r"""
    Configuration of [`AlibiModel`] and its heads.

    Args:
        vocab_size (`int`, defaults to 32000): rows of the embedding, padding rows included.
        hidden_size (`int`, defaults to 2048): width of the residual stream.
        intermediate_size (`int`, *optional*): width of the MLP; `4 * hidden_size` if not given.
        num_hidden_layers (`int`, defaults to 24): decoder layers.
        num_attention_heads (`int`, defaults to 16): query heads; any number, powers of two or not.
        num_key_value_heads (`int`, *optional*): key/value heads, a divisor of the query heads; as many if not given.
        head_dim (`int`, *optional*): width of one head; `hidden_size / num_attention_heads` if not given.
        max_position_embeddings (`int`, defaults to 2048): training length in tokens; longer inputs are allowed.
        norm_type (`"layer_norm"` or `"rms_norm"`): which norm; with `norm_eps` and, for layer norm, `norm_bias`.
        embedding_norm (`bool`): a norm right after the embedding (BLOOM).
        residual_from_norm (`bool`): the residual branches off after the norm (BLOOM's
            `apply_residual_connection_post_layernorm`).
        attention_bias, attention_out_bias, mlp_bias (`bool`): biases of q/k/v, of the output projection and of the MLP.
        mlp_type (`"plain"` or `"gated"`): `down(act(up(x)))` or `down(act(gate(x)) * up(x))`, with `hidden_act`.
        clip_qkv (`float`, *optional*): queries, keys and values are clamped to this absolute value.
        qk_norm (`"full"` or `"head"`, *optional*): a norm on queries and keys, over all heads together or per head.
        attention_scale (`float`, *optional*): factor on the scores; `1 / sqrt(head_dim)` if not given.
        embedding_scale, logit_scale (`float`, *optional*): factors on the embeddings and on the logits.
        attn_logit_softcapping, final_logit_softcapping (`float`, *optional*): `cap * tanh(x / cap)` on scores, logits.
        alibi (`bool`, defaults to `True`): ALiBi's bias on the scores. It and the next three fields are independent;
            with none of them the decoder has no positions at all (NoPE).
        rope_parameters (`dict`, *optional*): Transformers' own, `{"rope_type", "rope_theta", ...}`: queries and keys
            are rotated (RoPE), with any of its kinds of scaling; None: they are not.
        learned_positions (`bool`): an embedding of each position, learned, is added to the tokens' embeddings; the one
            encoding with a ceiling, `max_position_embeddings`.
        sinusoidal_positions (`bool`): sinusoidal embeddings of the positions are added to the tokens' embeddings, after
            `embedding_scale`, which is `sqrt(hidden_size)` in the paper.
        alibi_bias_max (`int` or `float`, defaults to 8): the slopes are `2 ** (-alibi_bias_max * i / heads)`.
        alibi_slopes (`list[float]`, *optional*): one positive slope a query head, used instead of the formula.
        alibi_distance (`"linear"` or `"sqrt"`): the bias is minus slope times distance, or times its square root.
        alibi_scaling (`dict`, *optional*): `{"type": "linear", "factor": f}` divides the slopes by `f`;
            `{"type": "linear", "train_seq_len": n}` by `length / n` once the length of a text passes `n`: its unmasked
            tokens up to the last query of the call, so that, as upstream, decoding changes the slopes with every token.
        alibi_rounding (`"exact"`, `"bloom"`, `"falcon"`, `"baichuan"` or `"jais"`): `"exact"` is ALiBi in float32 on
            relative distances; the others round slopes and bias bit for bit as upstream's class of that family does
            (`"jais"`: BTLM's and Jais', which round both to the dtype of the model).
        attention_dropout, hidden_dropout, embedding_dropout (`float`): dropout in training.
        attention_window (`bool`, defaults to `True`): leave out, head by head, keys that provably cannot change what
            attention computes, where that is faster. Dense attention without it; the numbers agree.
        attention_window_eps (`float`, *optional*): the share of a query's attention that may be left out; if not given,
            a quarter of the rounding of the dtype, and a sixteenth where gradients are wanted.
        initializer_range (`float`): standard deviation of new weights.

    Raises:
        StrictDataclassFieldValidationError: where a field has the wrong type or none of the accepted values.
        StrictDataclassClassValidationError: where fields contradict each other.
        ValueError: RoPE's fields outside `rope_parameters`.
    """

    model_type = "alibi"
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_tp_plan = {
        "embed_tokens": "embedding_rowwise",
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    hidden_size: int = 2048
    intermediate_size: int | None = None
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    norm_type: Literal["layer_norm", "rms_norm"] = "layer_norm"
    norm_eps: float | int = 1e-5
    norm_bias: bool = True
    embedding_norm: bool = False
    residual_from_norm: bool = False
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    mlp_type: Literal["plain", "gated"] = "plain"
    hidden_act: str = "gelu"
    clip_qkv: float | int | None = None
    qk_norm: Literal["full", "head"] | None = None
    attention_scale: float | int | None = None
    embedding_scale: float | int | None = None
    logit_scale: float | int | None = None
    attn_logit_softcapping: float | int | None = None
    final_logit_softcapping: float | int | None = None
    tie_word_embeddings: bool = True
    alibi: bool = True
    alibi_bias_max: float | int = 8
    alibi_slopes: list | None = None
    alibi_distance: Literal["linear", "sqrt"] = "linear"
    alibi_scaling: dict | None = None
    alibi_rounding: Literal["exact", "bloom", "falcon", "baichuan", "jais"] = "exact"
    learned_positions: bool = False
    sinusoidal_positions: bool = False
    rope_parameters: dict | None = None
    attention_window: bool = True
    attention_window_eps: float | int | None = None
    attention_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    embedding_dropout: float | int = 0.0
    initializer_range: float | int = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    foreign_reader: ClassVar[Any] = None
    """Set by the installed `alibi_hf` package: gives our fields for those of an upstream config.json."""

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read config.json; with `alibi_hf` installed, an upstream one too, as PEFT does where it saves an adapter."""
        found, rest = super().get_config_dict(*args, **kwargs)
        if cls.foreign_reader is not None and found.get("model_type", cls.model_type) != cls.model_type:
            found = cls.foreign_reader(found)
        return found, rest

    def __post_init__(self, **kwargs: Any) -> None:
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        self._refuse_rope_elsewhere(kwargs)
        if (labels := kwargs.get("num_labels")) is not None and not 0 <= labels <= MAX_LABELS:
            raise ValueError(f"num_labels={labels} must be between 0 and {MAX_LABELS}: a name is made for each.")
        has_rope = self.rope_parameters is not None
        if self.rope_parameters is not None:
            self.rope_parameters = dict(self.rope_parameters)  # the caller's own is not filled in
        super().__post_init__(**kwargs)
        if not has_rope:
            self.rope_parameters = None  # Transformers fills in a default RoPE wherever the field exists

    def _refuse_rope_elsewhere(self, kwargs: dict[str, Any]) -> None:
        for name in ROPE_ELSEWHERE:
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{name}={kwargs[name]!r} belongs in rope_parameters, which is {self.rope_parameters!r}; give "
                    'rope_parameters={"rope_type": ..., "rope_theta": ..., ...}, or drop it.'
                )

    def validate_architecture(self) -> None:
        """Refuse fields that contradict each other; part of the strict validation.

        Raises:
            ValueError: naming the fields, their values, and what would be accepted.
        """
        self._validate_sizes()
        self._validate_alibi()
        if self.learned_positions and self.sinusoidal_positions:
            raise ValueError(
                "learned_positions=True and sinusoidal_positions=True: both are added to the embeddings; choose one."
            )
        if getattr(self, "sliding_window", None) is not None or getattr(self, "layer_types", None) is not None:
            raise ValueError("sliding_window and layer_types are not supported: every layer attends to all tokens.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r} is not an activation that Transformers knows.")
        self._validate_numbers()
        self._validate_description()

    def _validate_description(self) -> None:
        """Refuse what Transformers trips over when it loads the weights."""
        named, dtype = self.architectures, self.dtype
        if isinstance(dtype, str):  # a model that is saved puts its name here
            dtype = getattr(torch, dtype, dtype)
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r:.200} is none of float64, float32, bfloat16 and float16.")
        if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
            raise ValueError(f"architectures={named!r:.200} is no list of class names.")
        for part in ("decoder", "generator", "text_config", "text_encoder"):
            if getattr(self, part, None) is not None:
                raise ValueError(f"{part}={getattr(self, part)!r:.200} is not supported: the decoder is all there is.")

    def _validate_sizes(self) -> None:
        for name, largest in LARGEST.items():
            value = getattr(self, name)
            if value is None or value <= 0:
                raise ValueError(f"{name}={value} must be a positive integer.")
            if value > largest:
                raise ValueError(f"{name}={value} is more than any decoder has: at most {largest}.")
        if self.num_attention_heads % (self.num_key_value_heads or 1):
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}."
            )

    def _validate_numbers(self) -> None:
        for name in ("norm_eps", "alibi_bias_max", "clip_qkv", "attn_logit_softcapping", "final_logit_softcapping"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be positive and finite.")
        for name in ("attention_scale", "embedding_scale", "logit_scale"):
            value = getattr(self, name)
            if value is not None and not -math.inf < value < math.inf:
                raise ValueError(f"{name}={value} must be finite.")
        for name in ("attention_dropout", "hidden_dropout", "embedding_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1.")

        if self.attention_window_eps is not None and not 0 < self.attention_window_eps < 1:
            raise ValueError(f"attention_window_eps={self.attention_window_eps} must be above 0 and below 1.")

    def _validate_alibi(self) -> None:
        if not self.alibi:
            self._refuse_alibi_fields()
        if self.alibi_slopes is not None:
            if len(self.alibi_slopes) != self.num_attention_heads:
                raise ValueError(
                    f"alibi_slopes has {len(self.alibi_slopes)} entries, num_attention_heads is "
                    f"{self.num_attention_heads}; give one slope a query head."
                )
            wrong = [slope for slope in self.alibi_slopes if not 0 <= slope < math.inf]
            if wrong:
                raise ValueError(f"alibi_slopes must be finite and not negative, found {wrong!r:.200}.")
        if self.alibi_rounding != "exact" and not self._rounds_its_own():
            raise ValueError(
                f"alibi_rounding={self.alibi_rounding!r} reproduces upstream's own slopes; it cannot be combined with "
                f"alibi_distance={self.alibi_distance!r}, alibi_scaling={self.alibi_scaling!r}, "
                f"alibi_bias_max={self.alibi_bias_max} and alibi_slopes={self.alibi_slopes}."
            )
        self._validate_alibi_scaling()

    def _refuse_alibi_fields(self) -> None:
        """Refuse, in a model without ALiBi, what would change nothing."""
        plain = {"alibi_slopes": None, "alibi_scaling": None, "alibi_distance": "linear", "alibi_rounding": "exact"}
        for name, default in plain.items():
            if getattr(self, name) != default:
                raise ValueError(f"{name}={getattr(self, name)!r} with alibi=False: nothing reads it; drop one.")

    def _rounds_its_own(self) -> bool:
        """True if upstream's rounded code has these slopes, distances and scaling."""
        if self.alibi_distance != "linear":
            return False
        if self.alibi_rounding == "jais":  # its slopes are a tensor of the checkpoint, and may be scaled
            return True
        return self.alibi_scaling is None and self.alibi_bias_max == 8 and self._has_usual_slopes()

    def _has_usual_slopes(self) -> bool:
        """True if `alibi_slopes` is not set, or says what upstream's rounded code computes too."""
        if self.alibi_slopes is None:
            return True
        folded = math.sqrt(self.head_dim or 1) if self.alibi_rounding == "falcon" else 1.0
        usual = [slope / folded for slope in alibi_slopes(self.num_attention_heads)]
        return all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(self.alibi_slopes, usual, strict=True))

    def _validate_alibi_scaling(self) -> None:
        scaling = self.alibi_scaling
        if scaling is None:
            return
        value = scaling.get("factor", scaling.get("train_seq_len"))
        named = set(scaling) in ({"type", "factor"}, {"type", "train_seq_len"})
        if not named or scaling["type"] != "linear" or not isinstance(value, (int, float)) or not 1 < value < math.inf:
            raise ValueError(
                f'alibi_scaling={scaling!r} must be {{"type": "linear", "factor": more than 1}} or '
                f'{{"type": "linear", "train_seq_len": more than 1}}.'
            )

    def validate_rope(self) -> None:
        """Refuse `rope_parameters` that Transformers refuses, or from which no rotation of a head follows.

        Raises:
            ValueError: naming the field, what was found, and what would be accepted.
        """
        parameters = self.rope_parameters
        if parameters is None:
            return
        self._validate_sizes()  # a frequency is made for each pair of features
        kind = parameters.get("rope_type", "default")
        if kind not in rope_types():
            raise ValueError(f"rope_parameters={parameters!r}: rope_type must be one of {rope_types()}.")
        theta = parameters.get("rope_theta")
        if not isinstance(theta, (int, float)) or not 0 < theta < math.inf:
            raise ValueError(f"rope_parameters={parameters!r}: rope_theta={theta!r} must be positive and finite.")
        try:
            super().validate_rope()
            with torch.device("cpu"):  # a model that is being loaded makes its tensors without numbers
                frequencies, factor = rope_frequencies(self)
            for name in ("short_factor", "long_factor"):
                if name in parameters and len(parameters[name]) != frequencies.numel():
                    raise ValueError(
                        f"{name} has {len(parameters[name])} entries, and a head turns {frequencies.numel()} pairs."
                    )
            with torch.device("cpu"):
                far = rope_frequencies(self, lengths=torch.tensor(2**30))[0]
        except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            raise ValueError(f"rope_parameters={parameters!r} cannot be used: {error}") from error
        if not all(bool((each.isfinite() & (each >= 0)).all()) for each in (frequencies, far)):
            raise ValueError(f"rope_parameters={parameters!r} give angles that are not finite and positive.")
        if not 0 < factor < math.inf:
            raise ValueError(f"rope_parameters={parameters!r}: attention_factor={factor} must be positive and finite.")
        rotated = 2 * frequencies.numel()
        if not 0 < rotated <= (self.head_dim or 0):
            raise ValueError(
                f"rope_parameters={parameters!r} rotate {rotated} features of a head, and head_dim={self.head_dim}; "
                "an even number of them can be rotated."
            )

    @staticmethod
    def _check_received_keys(
        rope_type: str, received_keys: set, required_keys: set, optional_keys: set | None = None, **kwargs: Any
    ) -> None:
        """Refuse what Transformers' own check only warns of: a field of `rope_parameters` that nothing reads."""
        read = {*required_keys, *(optional_keys or ()), "type", "rope_type", "rope_theta", "partial_rotary_factor"}
        if rope_type == "proportional":
            read.add("factor")  # which Transformers reads, and forgets to list
        if unread := sorted(map(str, received_keys - read)):
            raise ValueError(
                f"rope_type={rope_type!r} does not read {', '.join(unread)}; drop it, or correct its name."
            )
        PreTrainedConfig._check_received_keys(rope_type, received_keys, required_keys, optional_keys, **kwargs)

    def validate_output_attentions(self) -> None:
        """Accept `output_attentions` with every backend: the weights are computed beside the output."""

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `config.json` and all code files that its auto_map needs, wherever this object was loaded from."""
        self.auto_map = dict(AUTO_MAP)
        if self._auto_class is not None:  # Transformers copies what this file imports, which the models are not
            os.makedirs(save_directory, exist_ok=True)
            for path in Path(__file__).parent.glob("*_alibi.py"):
                shutil.copy(path, save_directory)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


def _announce_classes() -> None:
    """Let `transformers serve` load these models: it looks up `architectures` in its module `transformers`.

    It finds the Auto class there, which takes the code of the folder, or the installed package's, as ever. Its module
    may be another object than the one imported here: `transformers.processing_utils` puts a second in its place.
    """
    server = sys.modules.get("transformers.cli.serving.model_manager")
    for module in (transformers, getattr(server, "transformers", transformers)):
        for auto_class, place in AUTO_MAP.items():
            if auto_class != "AutoConfig":
                setattr(module, place.rpartition(".")[2], getattr(transformers, auto_class))


_announce_classes()

__all__ = ["LARGEST", "MAX_LABELS", "AlibiConfig"]
