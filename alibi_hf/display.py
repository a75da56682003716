"""The reports as tables on a terminal."""

from __future__ import annotations

import re
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from alibi_hf.checkpoints.conversion import Conversion
from alibi_hf.checkpoints.export import Export
from alibi_hf.checkpoints.inspect import Inspection
from alibi_hf.checkpoints.listing import FamilyInfo, FamilyList
from alibi_hf.evaluation import Evaluation
from alibi_hf.evaluation.reach_report import Reach
from alibi_hf.hub.report import Push
from alibi_hf.retrofitting import Retrofit
from alibi_hf.verification import Verification

Report = Inspection | Conversion | Export | Retrofit | Verification | FamilyList | Evaluation | Reach | Push
_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
_UNITS = ("B", "kB", "MB", "GB", "TB")


def render(report: Report) -> RenderableType:
    """Return what the command line prints for a report."""
    if isinstance(report, Inspection):
        return Group(_inspection(report), _tensors(report.tensors))
    if isinstance(report, Conversion):
        return _conversion(report)
    if isinstance(report, Export):
        return _export(report)
    if isinstance(report, Retrofit):
        return _retrofit(report)
    if isinstance(report, FamilyList):
        return _families(report)
    if isinstance(report, Push):
        return _push(report)
    return report.table()


def size(count: int) -> str:
    """Return a number of bytes with its unit, in powers of 1000: "8.4 MB"."""
    value, unit = float(count), 0
    while value >= 1000 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{count} B" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"


def _pairs(title: str, rows: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _notes(notes: list[str]) -> dict[str, str]:
    return {"notes": "; ".join(notes)} if notes else {}


def _inspection(report: Inspection) -> Table:
    config = report.config
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    rows = {
        "family": f"{report.family} (loads as {report.class_name})",
        "proved against": report.reference + (f": {report.reference_note}" if report.reference_note else ""),
        "position": report.position,
        "slopes": ", ".join(f"{slope:.4g}" for slope in report.slopes),
        "size": f"{report.parameters:,} parameters, {config['num_hidden_layers']} layers, width "
        f"{config['hidden_size']}, {heads} heads" + ("" if groups == heads else f" on {groups} key/value heads"),
        "vocabulary": f"{config['vocab_size']:,}",
        "files": ", ".join(f"{file['name']} ({size(file['bytes'])})" for file in report.files),
        "dtype": report.dtype,
        "memory to load": f"{size(report.memory_to_load)}, and {size(report.cache_per_token)} a cached token",
        "memory to convert": size(report.memory_to_convert),
        "disk to convert": size(report.disk_to_convert),
        **_notes(report.notes),
    }
    return _pairs(report.source, rows)


def _tensors(tensors: list[dict[str, Any]]) -> RenderableType:
    """Return two lines a kind of tensor: the layers of one kind share them."""
    kinds: dict[tuple[str, str, str], int] = {}
    for tensor in tensors:
        targets = _braced([_LAYER.sub("{i}", target) for target in tensor["target"]])
        how = " ".join(filter(None, (tensor["rule"], tensor["reason"] and f"({tensor['reason']})")))
        shape = " x ".join(map(str, tensor["shape"]))
        kind = (_LAYER.sub("{i}", tensor["source"]), shape, f"{how} -> {targets}" if targets else how)
        kinds[kind] = kinds.get(kind, 0) + 1
    table = Table(title="every tensor, the layers of one kind together", title_justify="left", title_style="bold")
    table.add_column("tensor and what becomes of it", overflow="fold")
    table.add_column("shape", justify="right")
    table.add_column("number", justify="right")
    for (source, shape, becomes), count in kinds.items():
        table.add_row(f"{escape(source)}\n  [dim]{escape(becomes)}[/]", shape, str(count))
    return table


def _braced(names: list[str]) -> str:
    """Return names that differ in one part as one: "a.q_proj.b", "a.k_proj.b" as "a.{q_proj,k_proj}.b"."""
    places = [sorted(set(parts), key=parts.index) for parts in zip(*(name.split(".") for name in names), strict=True)]
    return ".".join(parts[0] if len(parts) == 1 else "{" + ",".join(parts) + "}" for parts in places)


def _retrofit(report: Retrofit) -> Table:
    ours = report.config["to"]
    rows = {
        "source": f"{report.source['path_or_id']} ({report.source['family']})",
        "what it is": report.statement,
        **_notes(report.notes),
        "slopes": f"{ours['num_attention_heads']} heads, alibi_bias_max {ours['alibi_bias_max']:g}",
        **_written(report, ("used", "tied", "dropped")),
        "the source's weights": report.weights,
        "next": "train it; `retrofit.md` in the folder says what was done",
    }
    return _pairs(str(report.output_path), rows)


def _written(report: Conversion | Export | Retrofit, kinds: tuple[str, ...]) -> dict[str, str]:
    fates = [tensor["fate"] for tensor in report.tensors]
    return {
        "tensors": ", ".join(f"{fates.count(fate)} {fate}" for fate in kinds),
        "weights": ", ".join(f"{file['name']} ({size(file['bytes'])})" for file in report.output["files"]),
    }


def _conversion(report: Conversion) -> RenderableType:
    verified = {True: "proved", False: "not proved", None: "not verified"}[report.verified]
    summary = _pairs(
        str(report.output_path),
        {
            "source": f"{report.source['path_or_id']} ({report.source['family']})",
            **_written(report, ("used", "tied", "dropped")),
            "parity": verified,
            **_notes(report.notes),
        },
    )
    return summary if report.verification is None else Group(report.verification.table(), summary)


def _export(report: Export) -> Table:
    rows = {
        "source": report.source["path"],
        "for": f"{report.target} ({report.architecture})",
        **_written(report, ("used", "padded")),
    }
    notes = {f"note {number}": note for number, note in enumerate(report.notes, 1)}
    return _pairs(str(report.output_path), rows | notes)


def _push(report: Push) -> RenderableType:
    files = Table(title="what would go" if report.dry_run else "what went", title_justify="left", title_style="bold")
    files.add_column("file", overflow="fold")
    files.add_column("size", justify="right")
    for entry in report.files:
        files.add_row(escape(entry.name), size(entry.bytes))
    alike = ", ".join(entry.name for entry in report.preflight)
    rows = {
        "parity": report.verdict,
        "by its own code": f"the same bits as this package: {alike}",
        "files": f"{len(report.files)}, {size(report.bytes)}",
        "left out": ", ".join(f"{entry.name} ({entry.reason})" for entry in report.left_out) or "nothing",
        **_notes(report.notes),
        **_uploaded(report),
    }
    return Group(files, _pairs(f"{report.folder} to {report.repo_id}", {k: escape(v) for k, v in rows.items()}))


def _uploaded(report: Push) -> dict[str, str]:
    if (done := report.uploaded) is None:
        return {"dry run": "nothing was sent, and nobody was asked"}
    return {
        "repository": f"{'private' if done.private else 'public'}, {done.revision}",
        "commit": f"{done.commit}, the card {done.card_commit}",
        "deleted there": ", ".join(done.deleted) or "nothing",
        "to look at": done.url,
    }


def _families(report: FamilyList) -> RenderableType:
    return Group(*(_family(family) for family in report.families))


def _family(family: FamilyInfo) -> Table:
    rows = {
        "checkpoints": ", ".join(family.checkpoints),
        "answers to": ", ".join(family.model_types),
        "switches": ", ".join(family.switches),
        "alibi_rounding": ", ".join(family.roundings),
        "proved against": family.reference,
        "by": family.proof,
        "outside check": ", ".join(family.outside),
        "read by": ", ".join(family.reads),
        "written as": ", ".join(["this package's layout", *family.exports]),
        "upstream's defects": "; ".join(family.defects),
    }
    return _pairs(family.name, {name: value or "none" for name, value in rows.items()})
