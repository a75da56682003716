"""Cards of published checkpoints: `facts.yaml` holds what is known of each, `upstream.md` is the template.

Sizes, slopes and memory are computed by the code that loads the checkpoint.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from huggingface_hub import ModelCard, ModelCardData

from alibi_hf.checkpoints.listing import FamilyInfo, list_families
from alibi_hf.families import Family, all_families
from alibi_hf.families._layout import head_sizes
from alibi_hf.hub.card_metadata import HUB
from alibi_hf.hub.card_text import bullets, code, table
from alibi_hf.hub.citations import bibtex
from alibi_hf.model.bias_alibi import config_slopes
from alibi_hf.model.configuration_alibi import AlibiConfig
from alibi_hf.model.modeling_alibi import AlibiForCausalLM

HERE = Path(__file__).parent
LAYERWISE_FROM = 3e9  # parameters: a class and its truth in float64 take 16 bytes each


@dataclass(frozen=True)
class Published:
    """A published checkpoint: its entry in `facts.yaml`, with what its group says.

    Attributes:
        id: on the Hub.
        family: the family's name.
        config: upstream's config.json as far as it is known.
        facts: everything else: license, language, cite, from, note, parameters, unknown, large, exports.
    """

    id: str
    family: str
    config: dict[str, Any]
    facts: dict[str, Any]

    @property
    def name(self) -> str:
        """The last part of the id; the card's file is called so."""
        return self.id.split("/")[-1]

    @property
    def module(self) -> Family:
        """The family's module."""
        return next(family for family in all_families() if family.NAMES[0] == self.family)

    @property
    def own_config(self) -> AlibiConfig | None:
        """The config in our fields, None where no sizes are known; what is not known has upstream's default."""
        if not self.knows("num_hidden_layers"):
            return None
        return self.module.config({"model_type": self.family, **self.config})

    def knows(self, field: str) -> bool:
        """Whether the facts hold a field of our config, under whichever name upstream has for it."""
        return any(name in self.config for known in self.module.FIELDS if known.to == field for name in known.names)


def read_facts(path: Path = HERE / "facts.yaml") -> list[Published]:
    """Every published checkpoint of the facts, in their order."""
    found = []
    for group in yaml.safe_load(path.read_text(encoding="utf-8")):
        shared = {name: value for name, value in group.items() if name not in ("checkpoints", "config", "family")}
        for entry in group["checkpoints"]:
            config = {**group.get("config", {}), **entry.get("config", {})}
            facts = {**shared, **{name: value for name, value in entry.items() if name not in ("id", "config")}}
            found.append(Published(entry["id"], group["family"], config, facts))
    return found


def parameters(config: AlibiConfig) -> tuple[int, int]:
    """Number of parameters, and of those outside embedding and head, by the shapes of a model without memory."""
    with torch.device("meta"):
        model = AlibiForCausalLM(config)
    total = sum(parameter.numel() for parameter in model.parameters())  # a tied head is the embedding
    outer = {id(module.weight): module.weight.numel() for module in (model.model.embed_tokens, model.lm_head)}
    return total, total - sum(outer.values())


def upstream_card(entry: Published) -> str:
    """The card of a published checkpoint."""
    info = family_info(entry.family)
    config = entry.own_config
    facts = entry.facts
    counted = parameters(config)[1] if config else 0
    data = ModelCardData(
        base_model=entry.id,
        license=facts.get("license"),
        language=facts.get("language"),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["alibi", entry.family],
    )
    card = ModelCard.from_template(
        data,
        template_str=(HERE / "upstream.md").read_text(encoding="utf-8"),
        id=entry.id,
        name=entry.name,
        hub=HUB,
        family=entry.family,
        source=facts["from"],
        note=facts.get("note"),
        table=sizes(entry, config) if config else None,
        folder=entry.name.lower(),
        layerwise=" --layerwise" if counted > LAYERWISE_FROM or facts.get("large") else "",
        exports=facts.get("exports", info.exports),
        reference=_reference(info),
        defects=bullets(info.defects),
        licence=f"{code(facts['license'])}." if "license" in facts else "Not recorded here.",
        bibtex=bibtex(*facts.get("cite", [])),
    )
    return tidy(str(card))


def sizes(entry: Published, config: AlibiConfig) -> str:
    """The table of what is known and what follows from it."""
    heads, groups, head_dim = head_sizes(config)
    total, inner = parameters(config)
    rows: dict[str, Any] = {"layers": config.num_hidden_layers, "width": config.hidden_size, "heads": heads}
    if groups != heads:
        rows["key/value heads"] = groups
    rows["width of the MLP"] = config.intermediate_size
    if entry.knows("vocab_size"):
        rows["vocabulary"] = config.vocab_size
    if entry.knows("max_position_embeddings"):
        rows["training length, tokens"] = config.max_position_embeddings
    unknown = entry.facts.get("unknown", [])
    if entry.knows("vocab_size") and "head" not in unknown:
        rows |= {"parameters": total, "bytes of the weights in bfloat16": 2 * total}
    else:
        rows["parameters without embedding and head"] = inner
    rows["bytes a cached token in bfloat16"] = 2 * 2 * config.num_hidden_layers * groups * head_dim
    cells = [[name, f"{value:,}"] for name, value in rows.items()]
    if "slopes" not in unknown:
        cells.append(["slopes", slopes(entry, config)])
    if config.alibi_distance != "linear":
        cells.append(["bias", "slope times the square root of the distance"])
    return table(["", "value"], cells, (1,))


def slopes(entry: Published, config: AlibiConfig) -> str:
    """The slopes in words."""
    if entry.family in ("btlm", "jais"):
        return "stored in the checkpoint"
    found, heads = config_slopes(config), config.num_attention_heads
    power = heads & (heads - 1) == 0
    kind = "a geometric series" if power else "two interleaved series: the number of heads is no power of two"
    return f"{float(found.max()):.4g} to {float(found.min()):.4g}, {kind}"


def family_info(family: str) -> FamilyInfo:
    """What the list of families says about one."""
    return next(info for info in list_families().families if info.name == family)


def _reference(info: FamilyInfo) -> str:
    kind = "a class of Transformers" if info.reference.startswith("transformers.") else "a plain module of this package"
    outside = f" The tests also compare tiny models with {' and '.join(info.outside)}." if info.outside else ""
    return f"`{info.reference}`, {kind}: {info.proof}.{outside}"


def tidy(text: str) -> str:
    """Without the empty lines that a template leaves."""
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text.strip("\n") + "\n"
