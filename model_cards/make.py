"""Cards of the shipped checkpoints and of published ones, and the table of all, from one source of facts.

* `facts.yaml` holds what is known; sizes, slopes and memory are computed by the code that loads the checkpoint.
* `upstream.md` and `shipped.md` are the templates. The same facts give the same bytes.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from alibi_hf.checkpoints.listing import FamilyInfo, list_families
from alibi_hf.families import Family, all_families, find_family
from alibi_hf.families._layout import head_sizes
from alibi_hf.hub.card_metadata import HUB
from alibi_hf.hub.card_text import bullets, code, table
from alibi_hf.hub.citations import bibtex
from alibi_hf.model.bias_alibi import config_slopes
from alibi_hf.model.configuration_alibi import AlibiConfig
from alibi_hf.model.modeling_alibi import AlibiForCausalLM

HERE = Path(__file__).parent
CHECKPOINTS = HERE.parent / "examples" / "checkpoints"
SHIPPED = {"sotu-bloom": "BLOOM", "sotu-mpt": "MPT"}
LAYERWISE_FROM = 3e9  # parameters: a class and its truth in float64 take 16 bytes each
INDEX = "README.md"
INTRODUCTION = """# Model cards

Of the two shipped checkpoints, and of published ones: what is known of each, and the commands that apply to it. Made by
`make cards` from `facts.yaml`; what could not be read is left out there, and an empty cell here. `alibi-hf convert`
writes its own card beside the weights.
"""


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
    info = _info(entry.family)
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
    return _tidy(str(card))


def sizes(entry: Published, config: AlibiConfig) -> str:
    """The table of what is known and what follows from it."""
    heads, groups, head_dim = head_sizes(config)
    total, inner = parameters(config)
    rows = {"layers": config.num_hidden_layers, "width": config.hidden_size, "heads": heads}
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


def _info(family: str) -> FamilyInfo:
    return next(info for info in list_families().families if info.name == family)


def _reference(info: FamilyInfo) -> str:
    kind = "a class of Transformers" if info.reference.startswith("transformers.") else "a plain module of this package"
    outside = f" The tests also compare tiny models with {' and '.join(info.outside)}." if info.outside else ""
    return f"`{info.reference}`, {kind}: {info.proof}.{outside}"


def shipped_card(name: str) -> str:
    """The card of a checkpoint in `examples/checkpoints`, from its own files."""
    folder = CHECKPOINTS / name
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    family = raw["model_type"]
    config, info = find_family(raw).config(raw), _info(family)
    held_out = {int(length): value for length, value in training["held_out_perplexity"].items()}
    data = ModelCardData(
        license="apache-2.0",
        language="en",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["alibi", family],
        metrics=["perplexity"],
        model_name=name,
        eval_results=[_result(length, value) for length, value in held_out.items()],
    )
    card = ModelCard.from_template(
        data,
        template_str=(HERE / "shipped.md").read_text(encoding="utf-8"),
        name=name,
        title=SHIPPED[name],
        family=family,
        folder=f"my-{family}",
        exports=info.exports,
        training=training,
        shape=_shape(config),
        dtype=raw["dtype"],
        vocabulary=config.vocab_size,
        context=config.max_position_embeddings,
        megabytes=f"{(folder / 'model.safetensors').stat().st_size / 1e6:.1f}",
        table=_training(training, held_out, config.max_position_embeddings),
        lengths=_lengths(held_out, config.max_position_embeddings),
        sample="\n".join(f"> {line}".rstrip() for line in training["sample"].split("\n")),
    )
    return _tidy(str(card))


def _result(length: int, value: float) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type="sotu",
        dataset_name="State of the Union addresses, every tenth held out",
        dataset_split="held-out",
        metric_type="perplexity",
        metric_name=f"perplexity, windows of {length} tokens",
        metric_value=value,
    )


def _shape(config: AlibiConfig) -> str:
    heads = config.num_attention_heads
    extras = ["a norm after the embedding"] if config.embedding_norm else []
    extras += [] if config.mlp_bias else ["no biases"]
    extras += ["tied embeddings"] if config.tie_word_embeddings else []
    shape = f"width {config.hidden_size}, {config.num_hidden_layers} layers, {heads} heads, {', '.join(extras)}."
    exponents = [f"{torch.log2(slope).item():g}" for slope in config_slopes(config)]
    if heads & (heads - 1) == 0:
        return (
            f"{shape} {heads} is a power of two, so the slopes\nare the plain powers `2 ** {exponents[0]}` to "
            f"`2 ** {exponents[-1]}`."
        )
    return (
        f"{shape} {heads} is not a power of two, so the slopes\ncome from the set for more heads, out of order: 2 to "
        f"the powers {', '.join(exponents)}."
    )


def _training(training: dict[str, Any], held_out: dict[int, float], length: int) -> str:
    rows = {
        "steps x tokens a step": f"{training['steps']:,} x {training['tokens_per_step']:,} "
        f"({training['tokens_per_step'] // length} rows of {length})",
        "training text": f"{training['training_tokens']:,} tokens",
        "held-out text": f"{training['held_out_tokens']:,} tokens",
        "optimizer": "AdamW, learning rate 3e-3, cosine, 100 steps of warm-up, weight decay 0.1, bfloat16 autocast",
        "seed, threads": f"{training['seed']}, {training['threads']}",
        "time on one CPU thread": f"{training['seconds'] / 60:.0f} minutes",
        "mean training loss": f"{training['mean_training_loss']}",
        **{f"held-out perplexity, windows of {tokens} tokens": f"{value}" for tokens, value in held_out.items()},
        "torch, transformers": f"{training['versions']['torch'].split('+')[0]}, {training['versions']['transformers']}",
    }
    return table(["figure", "value"], [[name, value] for name, value in rows.items()])


def _lengths(held_out: dict[int, float], trained: int) -> str:
    longest = max(held_out)
    if longest == trained:
        return (
            f"Transformers' MPT\nclass stops at its training length, so upstream has no figure beyond {trained} tokens."
        )
    return (
        f"On windows {longest / trained:g} times as\nlong as the training texts it goes from {held_out[trained]} to "
        f"{held_out[longest]}."
    )


def _tidy(text: str) -> str:
    """Without the empty lines that a template leaves."""
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text.strip("\n") + "\n"


def index(entries: list[Published]) -> str:
    """README.md of this folder: a table of all cards."""
    rows = [[f"[{name}]({name}.md)", SHIPPED[name].lower(), "in `examples/checkpoints`", "", ""] for name in SHIPPED]
    rows += [_row(entry) for entry in entries]
    lines = table(["card", "family", "checkpoint", "layers x width", "licence"], rows)
    return f"{INTRODUCTION}\n{lines}\n"


def _row(entry: Published) -> list[str]:
    config, licence = entry.own_config, entry.facts.get("license", "")
    shape = f"{config.num_hidden_layers} x {config.hidden_size}, {config.num_attention_heads} heads" if config else ""
    address = f"[{code(entry.id)}]({HUB}/{entry.id})"
    return [f"[{entry.name}]({entry.name}.md)", entry.family, address, shape, code(licence)]


def cards() -> dict[str, str]:
    """The text of every file, by its name."""
    entries = read_facts()
    made = {f"{name}.md": shipped_card(name) for name in SHIPPED}
    made |= {f"{entry.name}.md": upstream_card(entry) for entry in entries}
    return {**made, INDEX: index(entries)}


def write_all(folder: Path = HERE) -> list[Path]:
    """Write every card and the table of them into `folder`."""
    paths = []
    for name, text in cards().items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
        paths.append(folder / name)
    return paths
