"""The public surface as text: names and signatures, config fields, command line, exit status, and the JSON reports.

`python -m tests.surface` writes it to tests/surface.json, which `test_surface.py` compares with.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import typer

import alibi_hf
from alibi_hf import AlibiConfig, errors
from alibi_hf.cli import app
from alibi_hf.cli import running as cli_running
from alibi_hf.hub.contents import LeftOut
from alibi_hf.hub.upload import Uploaded
from tests.builders import bloom, tokenizer
from tests.retrofitting.sources import gpt2

FILE = Path(__file__).with_name("surface.json")
# What is in these follows the checkpoint, the machine or the check, and has no keys of its own.
EMPTY = "empty here"
OPEN = (
    "config.from",
    "config.to",
    "config.defaults",
    "config",
    "versions",
    "machine",
    "detail.ours",
    "detail.upstream",
)


def surface() -> dict[str, Any]:
    """Return everything that a release promises, but for the JSON reports."""
    return {
        "python": {name: public(getattr(alibi_hf, name)) for name in alibi_hf.__all__ if name != "__version__"},
        "config": config_fields(),
        "command line": commands(),
        "exit status": exit_statuses(),
    }


def public(value: Any) -> Any:
    """Return a function's parameters, an error's bases, the fields and methods of a report, the base of a model."""
    if not inspect.isclass(value):
        return parameters(value)
    if issubclass(value, Exception) or not dataclasses.is_dataclass(value) or value is AlibiConfig:
        return [base.__name__ for base in value.__bases__]
    fields = {field.name: words(field.type) for field in dataclasses.fields(value)}
    methods = {
        name: "property" if isinstance(member, property) else parameters(member)
        for name, member in inspect.getmembers(value)
        if not name.startswith("_") and name not in fields and (callable(member) or isinstance(member, property))
    }
    return {"fields": fields, "methods": methods}


def parameters(function: Callable) -> list[str]:
    """Return each parameter with its type and default; those after "*" only by name."""
    found, by_name = [], False
    for each in inspect.signature(function).parameters.values():
        if each.kind is each.KEYWORD_ONLY and not by_name:
            found.append("*")
            by_name = True
        kind = "" if each.annotation is each.empty else f": {words(each.annotation)}"
        found.append(f"{each.name}{kind}" + ("" if each.default is each.empty else f" = {each.default!r}"))
    return found


def words(annotation: Any) -> str:
    """Return a type as it is written, the same in every Python."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Z])", "", text)  # without modules, which Python moves


def config_fields() -> dict[str, str]:
    """Return the fields that `AlibiConfig` adds to Transformers' own, with type and default."""
    return {
        field.name: f"{words(field.type)} = {field.default!r}"
        for field in dataclasses.fields(AlibiConfig)
        if field.name in inspect.get_annotations(AlibiConfig)
    }


def commands() -> dict[str, dict[str, Any]]:
    """Return the arguments and options of each verb."""
    group = typer.main.get_command(app)
    called = {command.name or command.callback.__name__: command.callback for command in app.registered_commands}
    return {name: options(command, called[name]) for name, command in group.commands.items()}


def options(command: Any, function: Callable) -> dict[str, str]:
    """Return the arguments and options of a verb: type, default, and whether it must be given."""
    types, found = get_type_hints(function), {}
    for each in command.params:
        flags = " / ".join((*each.opts, *each.secondary_opts))
        assert each.help, f"{command.name}: {flags} has no help"
        default = "required" if each.required else f"= {each.default!r}"
        found[flags] = f"{words(types[each.name])} {default}"
    return found


def exit_statuses() -> dict[str, int]:
    """Return the exit status of the command line for each error that it knows."""
    found = {}
    raised = [each for name in errors.__all__ if inspect.isclass(each := getattr(errors, name))]
    for error in (*raised, alibi_hf.NotEnoughMemoryError, OSError):
        try:
            with cli_running.errors():
                raise error("on purpose")
        except typer.Exit as exit_:
            found[error.__name__] = exit_.exit_code
    return found


def reports(folder: Path) -> dict[str, Any]:
    """Return the schema of each JSON report, from real ones of a tiny checkpoint."""
    source = tokenizer(bloom(folder / "source", heads=2, layers=1))
    text = folder / "text.txt"
    text.write_text("".join(chr(33 + place * place % 90) for place in range(200)), encoding="utf-8")
    converted = alibi_hf.convert(source, folder / "out", verify=False)
    made = {
        "inspect --json": alibi_hf.inspect_checkpoint(source),
        "families --json": alibi_hf.list_families(),
        "conversion.json": converted,
        "verification.json": alibi_hf.verify(source, folder / "out", lengths=[16]),
        "evaluation.json": alibi_hf.evaluate([folder / "out"], text, [16, 32]),
        "reach.json": alibi_hf.reach(folder / "out", text, lengths=[64]),
        "retrofit.json": alibi_hf.retrofit(gpt2(folder / "gpt2", heads=2, layers=1), folder / "retrofitted"),
        "export.json": alibi_hf.export(folder / "out", folder / "back", "bloom"),
        "push.json": pushed(folder / "out"),
    }
    return {name: schema(json.loads(json.dumps(report.to_dict()))) for name, report in made.items()}


def pushed(folder: Path) -> Any:
    """Return the report of a push, of which only the sending is made up."""
    report = alibi_hf.push(folder, "owner/name", dry_run=True, unverified=True)
    uploaded = Uploaded("commit", "commit", False, "main", "https://...", ["old.safetensors"])
    return dataclasses.replace(report, uploaded=uploaded, notes=["a sentence"], left_out=[LeftOut("name", "why")])


def schema(value: Any, path: str = "") -> Any:
    """Return the keys and types of a JSON value; entries of a list are taken together."""
    if isinstance(value, dict):
        if path.endswith(OPEN) and path:
            return "object"
        return {name: schema(entry, f"{path}.{name}".lstrip(".")) for name, entry in value.items()}
    if isinstance(value, list):
        return [together([schema(entry, path) for entry in value])]
    names = {str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names[type(value)]


def together(entries: list[Any]) -> Any:
    """Return what entries of one list have in common: all keys of objects, all types of the rest."""
    objects = [entry for entry in entries if isinstance(entry, dict)]
    if objects:
        names = dict.fromkeys(name for entry in objects for name in entry)
        return {name: together([entry[name] for entry in objects if name in entry]) for name in names}
    if lists := [entry for entry in entries if isinstance(entry, list)]:
        return [together([each for entry in lists for each in entry])]
    kinds = {kind for entry in entries for kind in entry.split(" | ")} - {EMPTY}
    return " | ".join(sorted(kinds)) or EMPTY


def written(found: dict[str, Any]) -> str:
    """Return it as the file holds it."""
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Write tests/surface.json."""
    from tests.scratch import scratch_folder

    FILE.write_text(written({**surface(), "reports": reports(scratch_folder("surface-"))}), encoding="utf-8")


if __name__ == "__main__":
    main()
