"""The parts of a card that are computed: verdict, description, proof, files, perplexity, limits. All are Markdown."""

from pathlib import Path
from typing import Any

from alibi_hf.evaluation.findings import of_protocol
from alibi_hf.evaluation.report import Reading
from alibi_hf.evaluation.table import bits, perplexity
from alibi_hf.hub.card_facts import PICTURE, CardFacts
from alibi_hf.hub.card_metadata import HUB
from alibi_hf.hub.card_text import bullets, code, plain, table
from alibi_hf.hub.proof import CONVERSION
from alibi_hf.verification.render import COLUMNS, ON_TERMINAL, check_cells, control_cells, number, telling

_RIGHT = (2, 3, 4, 5)
_COUNTS_MASKED = ("mpt", "mosaic_gpt", "replit_lm")  # upstream counts masked tokens inside a row as distance
_NO_PADDING = "step1"


def verdict(facts: CardFacts) -> str:
    """Return whether it was proved that the folder computes what its source does, in a line or two."""
    record, proof = facts.record, facts.verification
    if facts.retrofitted:
        return f"**{plain(record.get('statement', 'Retrofitted with ALiBi.'))}**"
    if not record:
        return f"**Not verified**: there is no `{CONVERSION}` that says what this was converted from."
    verified = record.get("verified")
    if verified is None:
        return "**Not verified**: no verification was run."
    if not verified:
        return "**Not verified**: the verification failed; see `verification.md` before using this checkpoint."
    if facts.why_not_proved:
        return f"**Not verified**: {plain(facts.why_not_proved)}."
    reference = proof.get("reference", {}).get("class")
    against = f" It was compared with {code(reference)} in float64.{_nearest(facts)}" if reference else ""
    return f"**Verified**: `verification.md` shows how near it is to upstream.{against}"


def _nearest(facts: CardFacts) -> str:
    """The largest error of the logits in the first dtype, and upstream's there; "" where logits were not compared."""
    compared = [check for check in facts.checks if check.name.startswith("logits")]
    rows = [check for check in compared if check.dtype == compared[0].dtype]
    ours, theirs = ([getattr(check, side) for check in rows] for side in ("ours", "upstream"))
    if not rows or None in ours + theirs:
        return ""
    shortest, longest = min(check.length for check in rows), max(check.length for check in rows)
    lengths = f"{longest}" if shortest == longest else f"{shortest} to {longest}"
    return (
        f" The logits are within {number(max(ours))} of it in {plain(rows[0].dtype)}, at {lengths} tokens; upstream's "
        f"own are within {number(max(theirs))}."
    )


def description(facts: CardFacts) -> str:
    """Return what it is: size, shape, where it comes from."""
    config = facts.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    shared = "" if groups == heads else f" on {groups} key/value heads"
    origin = ""
    if facts.source_name:
        done = "retrofitted with ALiBi from" if facts.retrofitted else "converted from"
        at = f" at revision {code(facts.source['revision'])}" if facts.base_model else ""
        origin = f" It was {done} {_source(facts)}{at}, of the layout {code(facts.family)}."
    return (
        f"A decoder of {facts.parameters:,} parameters ({facts.dtype}): {config.num_hidden_layers} layers, width "
        f"{config.hidden_size}, {heads} heads{shared}, {config.vocab_size:,} tokens in the vocabulary. Positions come "
        f"from {_positions(facts)}; it was made for {config.max_position_embeddings:,} tokens, and longer inputs are "
        f"{'refused' if config.learned_positions else 'allowed'}.{origin}"
    )


def _positions(facts: CardFacts) -> str:
    """What tells the model where a token is: a model with another encoding beside or in place of ALiBi says so."""
    config = facts.config
    kinds = {
        f"ALiBi ({config.alibi_distance} distance)": config.alibi,
        "a table of learned embeddings": config.learned_positions,
        "sinusoidal embeddings": config.sinusoidal_positions,
        "rotary embeddings": config.rope_parameters is not None,
    }
    return " and ".join(kind for kind, there in kinds.items() if there) or "the causal mask alone"


def _source(facts: CardFacts) -> str:
    name = code(facts.source_name)
    return f"[{name}]({HUB}/{facts.base_model})" if facts.base_model else name


def parity(facts: CardFacts) -> str:
    """Return the checks and the wrong conversions, with what they were compared with; "" where there are none."""
    checks, controls = telling(facts.checks), facts.controls
    if not checks:
        return ""
    rows = [check_cells(check) for check in checks] + [control_cells(control) for control in controls]
    columns = [COLUMNS[place] or "result" for place in ON_TERMINAL]
    said = {**facts.verification.get("reference", {}), "text": facts.verification.get("text", "")}
    lines = [f"{plain(name.replace('_', ' '))}: {plain(str(value))}" for name, value in said.items() if value]
    versions = facts.verification.get("versions", {})
    lines.append("versions: " + ", ".join(f"{plain(name)} {plain(str(version))}" for name, version in versions.items()))
    cells = [[plain(row[place]) for place in ON_TERMINAL] for row in rows]
    return f"{table(columns, cells, _RIGHT)}\n\n{bullets(lines)}"


def files(facts: CardFacts) -> str:
    """Return the weight files with their SHA-256, folded up where they are many."""
    rows = [[code(file["name"]), f"{file['bytes']:,}", f"`{file['sha256']}`"] for file in facts.files]
    made = table(["file", "bytes", "SHA-256"], rows, (1,))
    if len(rows) <= 4:
        return made
    return f"<details><summary>{len(rows)} weight files</summary>\n\n{made}\n\n</details>"


def perplexities(facts: CardFacts) -> str:
    """Return the perplexity by length, with the picture if it is there; "" where this model was not evaluated."""
    model, report = facts.reading, facts.evaluation
    if model is None or report is None:
        return ""
    protocols = [
        (p, {reading.length: reading for reading in of_protocol(model, p)}) for p in ("sliding", "non-overlapping")
    ]
    rows = [
        _row(length, *(found.get(length) for _, found in protocols))
        for length in sorted({r.length for r in model.readings})
    ]
    columns = ["tokens", "sliding windows", "non-overlapping windows", "bits a byte"]
    texts = ", ".join(f"{code(text['name'])} (SHA-256 `{text['sha256'][:12]}…`)" for text in report.text)
    picture = f"![Perplexity by length]({PICTURE})\n\n" if (facts.folder / PICTURE).is_file() else ""
    trained = f" It was trained on {model.trained_length:,} tokens." if model.trained_length else ""
    return (
        f"{picture}{table(columns, rows, range(len(columns)))}\n\nOn {texts}, {model.tokens:,} tokens, in "
        f"{plain(model.dtype)}, by `alibi-hf evaluate`.{trained} `evaluation.json` has every figure."
    )


def _row(length: int, sliding: Reading | None, apart: Reading | None) -> list[str]:
    known = sliding or apart
    return [f"{length:,}", perplexity(sliding), perplexity(apart), bits(known) if known else ""]


def limits(facts: CardFacts) -> str:
    """Return what a reader must know before using it."""
    config, family = facts.config, facts.family
    measured = (
        "the table above shows how well it reads them" if facts.reading else "how well it reads them was not measured"
    )
    trained = f"{config.max_position_embeddings:,} tokens, its training length"
    lines = [f"Past {trained}, it goes on with a notice; {measured}."]
    if config.learned_positions:
        lines = [f"It reads no more than {trained}: there are learned embeddings for that many positions."]
    if family in _COUNTS_MASKED:
        lines.append(
            "Masked tokens inside a row are not counted as distance; upstream counts them. Padding at either end is no "
            "different."
        )
    if family == _NO_PADDING:
        lines.append("Padding is masked; upstream ignores `attention_mask`, and its answers change with it.")
    if config.alibi_rounding != "exact":
        lines.append(f"The bias is rounded as upstream does (`alibi_rounding={config.alibi_rounding!r}`), on request.")
    lines += [
        "Documents packed in one row must come without a cache.",
        "vLLM's Transformers backend would drop the bias and is refused; `alibi-hf export` writes upstream's layout.",
        *(f"{plain(note[0].upper() + note[1:])}." for note in facts.record.get("notes", []) if note),
    ]
    if facts.tokenizer is None:
        lines.append("No tokenizer comes with it that loads without code of its own; take the source's.")
    if facts.source_name:
        lines.append(
            f"Data, biases and intended uses are those of {_source(facts)}; its own card is the authority on them."
        )
    return bullets(lines)


def upstream(facts: CardFacts) -> str:
    """Return what upstream's own code is known to get wrong, and this does not; "" where nothing is known."""
    if facts.retrofitted:
        return ""
    return bullets(plain(defect) for defect in facts.about.defects)


def licence(facts: CardFacts, data: dict[str, Any]) -> str:
    """Return what is said of the licence, and who says it."""
    kept = ", ".join(code(name) for name in facts.licences)
    beside = f" The source's {kept} is in this folder." if kept else ""
    if "license" not in data:
        return f"The source names no licence; ask its authors.{beside}"
    names = data["license"] if isinstance(data["license"], list) else [data.get("license_name") or data["license"]]
    return f"As the source's card says: {', '.join(code(str(name)) for name in names)}.{beside}"


def title(facts: CardFacts, repo_id: str | None) -> str:
    """Return the heading."""
    if repo_id:
        return plain(repo_id.split("/")[-1])
    name = plain(Path(facts.source_name).name) or "A model"
    if facts.retrofitted:
        return f"{name}, retrofitted with ALiBi"
    return f"{name}, converted to `alibi`" if facts.record else f"{name}, with ALiBi"


__all__ = ["description", "files", "licence", "limits", "parity", "perplexities", "title", "upstream", "verdict"]
