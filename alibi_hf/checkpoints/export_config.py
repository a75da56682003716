"""Our config as an upstream config.json: the inverse of the family's own map, proved by reading it back.

A target's map writes what upstream's format can say. Reading the result with the family's `config` then shows what the
upstream class computes, and every difference from our config is either made good exactly (a bias that we lack is a bias
of zeros) or refused by name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from alibi_hf.checkpoints.export_compare import BIASES, TOKENS, TRAINING, blamed, computed, near, shown
from alibi_hf.checkpoints.export_maps import bloom_fields, falcon_fields, foundry_fields, mpt_fields
from alibi_hf.checkpoints.export_servers import server_notes
from alibi_hf.checkpoints.export_source import Converted
from alibi_hf.errors import ConfigFieldError
from alibi_hf.families import Family, find_family
from alibi_hf.families._fields import LABEL_FIELDS
from alibi_hf.families._mpt_config import is_foundry
from alibi_hf.model.configuration_alibi import AlibiConfig

_HEAD_NAMES = ("ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


@dataclass(frozen=True)
class Target:
    """An upstream layout that can be written.

    Attributes:
        family_name: whose rules and config map are inverted.
        raw: our config as upstream's fields, without class, dtype, tokens and labels.
        classes: upstream's class of each of ours.
        reader: who computes it, for messages.
        caution: what whoever loads it there should know, one sentence.
        instead: what else may hold a config that this one cannot.
    """

    family_name: str
    raw: Callable[[AlibiConfig], dict[str, Any]]
    classes: dict[str, str]
    reader: str
    caution: str = ""
    instead: str = ""

    @property
    def family(self) -> Family:
        """The family module."""
        return find_family({"model_type": self.family_name})


def target_config(source: Converted, to: str) -> tuple[dict[str, Any], AlibiConfig, list[str]]:
    """Upstream's config.json for a folder, our config of what upstream computes from it, and what is to be known.

    Raises:
        ConfigFieldError: naming the field that the target cannot hold, its value, and what the target computes.
    """
    target, config = TARGETS[to], source.config
    _check_class(source, to)
    raw = recorded(source, to)
    notes = ["config.json is upstream's own, as conversion.json keeps it"]
    if raw is None:
        raw = {name: getattr(config, name) for name in (*TOKENS, "use_cache", "initializer_range")}
        raw = target.raw(config) | raw
        notes = _check(config, target.family.config(raw), to)
    raw["architectures"] = [target.classes[source.class_name]]
    mapped = target.family.config(raw)
    raw |= {name: getattr(config, name) for name in TOKENS if getattr(config, name) != getattr(mapped, name)}
    if source.class_name != "AlibiForCausalLM":
        raw |= {name: getattr(config, name) for name in LABEL_FIELDS if name != "num_labels"}
    mapped = target.family.config(raw)
    notes += [target.caution] if target.caution else []
    return raw, mapped, notes + server_notes(to, raw, mapped)


def _check_class(source: Converted, to: str) -> None:
    """Refuse a head that the target lacks, a rounding of the bias that it does not compute, and what no map says."""
    target, config, rounding = TARGETS[to], source.config, source.config.alibi_rounding
    if source.class_name not in target.classes:
        known = ", ".join(target.classes)
        raise ConfigFieldError(f"{to} cannot hold the head of {source.class_name}: {target.reader} has {known} only.")
    if rounding not in target.family.ROUNDINGS:
        raise ConfigFieldError(
            f"{to} cannot hold alibi_rounding={rounding!r}: {target.reader} computes "
            f"{' or '.join(target.family.ROUNDINGS)}. Set alibi_rounding to 'exact' in config.json."
        )
    if not config.alibi:
        raise ConfigFieldError(f"{to} cannot hold alibi=False: here it is written for models with ALiBi only.")
    if config.hidden_size % config.num_attention_heads:
        raise ConfigFieldError(
            f"{to} cannot hold hidden_size={config.hidden_size} with num_attention_heads={config.num_attention_heads}: "
            f"{target.reader} shares it out among the heads."
        )


def recorded(source: Converted, to: str) -> dict[str, Any] | None:
    """Upstream's own config.json, where the folder came from that layout and its config still says the same."""
    target, config = TARGETS[to], source.config
    raw = source.record.get("config", {}).get("from")
    if not isinstance(raw, dict) or raw.get("model_type") != target.family_name:
        return None
    if target.family_name == "mpt" and is_foundry(raw) != (to == "llm-foundry"):
        return None
    mapped = target.family.config(raw)
    ours, theirs = computed(config), computed(mapped)
    if any(not near(value, theirs[name]) for name, value in ours.items()):
        return None
    if any(getattr(config, name) != getattr(mapped, name) for name in TRAINING):
        return None
    return {name: value for name, value in raw.items() if name != "auto_map"}  # it names code that is not here


def _check(config: AlibiConfig, mapped: AlibiConfig, to: str) -> list[str]:
    """Refuse what `mapped`, read back from the target's own file, does not compute as `config` does; say the rest."""
    target, notes = TARGETS[to], []
    ours, theirs = computed(config), computed(mapped)
    for name, value in ours.items():
        if name in BIASES and theirs[name] and not value:
            notes.append(f"{name}: {target.reader} has these biases, the source has none; they are zeros")
        elif not near(value, theirs[name]):
            what = "the slopes " if name == "alibi_slopes" else ""
            raise ConfigFieldError(
                f"{to} cannot hold {blamed(config, name)}: {target.reader} computes {what}{shown(theirs[name])}. "
                f"{target.instead}".rstrip()
            )
    for name in TRAINING:
        if getattr(config, name) != getattr(mapped, name):
            notes.append(f"{name}={getattr(config, name)} is not kept; only training would read it")
    return notes


def _classes(start: str) -> dict[str, str]:
    return {f"Alibi{head}": f"{start}{head}" for head in _HEAD_NAMES}


TARGETS: dict[str, Target] = {
    "bloom": Target(
        "bloom",
        bloom_fields,
        _classes("Bloom"),
        "Transformers' BLOOM",
        caution="Transformers' BLOOM rounds the bias to the model's dtype: in 16 bits it is another bias than here",
    ),
    "mpt": Target(
        "mpt",
        mpt_fields,
        _classes("Mpt"),
        "Transformers' MPT",
        caution="Transformers' MPT raises past max_seq_len tokens; a larger max_seq_len changes nothing else",
        instead="llm-foundry's flavour (--to llm-foundry) can say more.",
    ),
    "llm-foundry": Target("mpt", foundry_fields, {"AlibiForCausalLM": "MPTForCausalLM"}, "llm-foundry's MPT"),
    "falcon": Target(
        "falcon",
        falcon_fields,
        _classes("Falcon"),
        "Transformers' Falcon",
        caution="Transformers' Falcon rounds the bias to bfloat16 in any dtype, and adds it twice in eager attention: "
        "load it with attn_implementation='sdpa'",
    ),
}

__all__ = ["TARGETS", "Target", "recorded", "target_config"]
