"""The card of a folder: README.md with the Hub's metadata, made from the files that are in the folder."""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from jinja2 import TemplateError
from yaml import YAMLError  # type: ignore[import-untyped]

from alibi_hf.checkpoints.json_files import read_json
from alibi_hf.checkpoints.writer import write_json
from alibi_hf.errors import AlibiError, CheckpointFileError, in_one_line
from alibi_hf.hub import card_tables
from alibi_hf.hub.card_examples import examples
from alibi_hf.hub.card_facts import CardFacts
from alibi_hf.hub.card_metadata import metadata
from alibi_hf.hub.citations import bibtex
from alibi_hf.hub.proof import CONVERSION, RETROFIT

CARD = "README.md"
TEMPLATE = Path(__file__).with_name("card.md")
_END = "<!-- alibi-hf: end -->"
_CARD = re.compile(
    r"\A---\n(?P<metadata>.*?)\n---\n(?P<before>.*?)"
    r"^<!-- alibi-hf: [^\n]*?metadata (?P<m>\w{12}), text (?P<t>\w{12})[^\n]*-->\n"
    rf"(?P<text>.*?)^{_END}\n(?P<after>.*)\Z",
    re.DOTALL | re.MULTILINE,
)
_VERDICT = re.compile(r"(?<=^<!-- verdict -->\n).*?(?=^<!-- /verdict -->$)", re.DOTALL | re.MULTILINE)


def write_card(
    folder: str | Path,
    *,
    repo_id: str | None = None,
    commit: str | None = None,
    template: str | Path | None = None,
    facts: CardFacts | None = None,
) -> Path:
    """Write `README.md` of a folder in this package's layout from what is in it, and return its path.

    The same files give the same bytes. What a person wrote is never lost: a card without the marks of this function is
    left alone; in one that has them, metadata or text that were edited stay as they are, and so does everything outside
    the marks. Only the verdict is brought up to date in edited text, where its own two comments are still there.

    Args:
        folder: with config.json, weights, and the records of conversion, verification and evaluation, as far as there
            are any.
        repo_id: "owner/name" on the Hub, which the examples then load from.
        commit: hash of the commit that the examples pin.
        template: a Jinja template to use in place of `card.md` beside this file, whose variables it may use. It is the
            caller's own: what it says is run.
        facts: of the folder, if they were read already; reading them hashes the weights.

    Raises:
        CheckpointFileError: where a file of the folder or the template cannot be read; ConfigFieldError for its config.
        AlibiError: where `repo_id` is no id, `commit` no hash, or the template makes no metadata.
    """
    _check(repo_id, commit)
    path = Path(folder) / CARD
    try:
        made = _make(facts or CardFacts.read(Path(folder)), repo_id, commit, Path(template) if template else TEMPLATE)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointFileError(
            f"a record of {folder} is not what this package writes ({in_one_line(error)}); take it away, or make it "
            f"again."
        ) from error
    working = path.with_name(f".{CARD}.partial")
    working.write_text(_merged(path, made), encoding="utf-8", newline="\n")
    os.replace(working, path)  # also where the card is a link into a cache
    return path


def mark_verified(folder: str | Path, proved: bool) -> None:
    """Write the verdict of a later verification into `conversion.json` and onto the card of a converted folder."""
    record = Path(folder) / CONVERSION
    if record.is_file():
        files = CardFacts.read(Path(folder)).files  # those that were verified
        write_json(record, {**read_json(record), "output": {"files": files}, "verified": proved})
        write_card(folder)


def _check(repo_id: str | None, commit: str | None) -> None:
    try:
        if repo_id is not None:
            validate_repo_id(repo_id)
    except HFValidationError as error:
        raise AlibiError(f"repo_id={repo_id!r} is no id of the Hub: {in_one_line(error)} Give owner/name.") from error
    if commit is not None and not re.fullmatch(r"[0-9a-f]{7,64}", commit):
        raise AlibiError(f"commit={commit!r} is no hash of a commit; a branch or tag can move, so it pins nothing.")


def _make(facts: CardFacts, repo_id: str | None, commit: str | None, template: Path) -> str:
    """The whole card, with the marks."""
    data = metadata(facts, repo_id, commit)
    values: dict[str, Any] = {
        "commit": commit,
        "repo_id": repo_id,
        "examples": examples(facts, repo_id, commit),
        "title": card_tables.title(facts, repo_id),
        "verdict": card_tables.verdict(facts),
        "description": card_tables.description(facts),
        "parity": card_tables.parity(facts),
        "perplexities": card_tables.perplexities(facts),
        "upstream": card_tables.upstream(facts),
        "limits": card_tables.limits(facts),
        "files": card_tables.files(facts),
        "licence": card_tables.licence(facts, data.to_dict()),
        "bibtex": bibtex(facts.family),
        "record": RETROFIT if facts.retrofitted else CONVERSION if facts.record else None,
        "facts": facts,
    }
    try:
        card = ModelCard.from_template(data, template_str=template.read_text(encoding="utf-8"), **values)
    except (OSError, ValueError, TemplateError, YAMLError) as error:
        raise CheckpointFileError(f"{template} makes no card: {in_one_line(error)}.") from error
    if not card.data.to_dict():
        raise CheckpointFileError(
            f"{template} makes no metadata; begin it with ---, {{{{ card_data }}}} and --- lines."
        )
    return _marked(card.data.to_yaml(), card.text.strip("\n") + "\n")


def _marked(head: str, text: str, before: str = "\n", after: str = "") -> str:
    mark = (
        f"<!-- alibi-hf: made from the files of this folder; metadata {_hash(head)}, text {_hash(text)}. "
        "What you change or add is kept. -->"
    )
    return f"---\n{head}\n---\n{before}{mark}\n{text}{_END}\n{after}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _merged(path: Path, made: str) -> str:
    """The card with what a person wrote into the one that is there."""
    if not path.is_file():
        return made
    try:
        there = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointFileError(f"{path} is not UTF-8 text: {error}; take it away, or save it as UTF-8.") from error
    old, new = _CARD.match(there), _CARD.match(made)
    if old is None or new is None:
        return there
    if _hash(old["text"]) != old["t"]:
        verdict = _VERDICT.search(new["text"])
        return _VERDICT.sub(lambda _: verdict[0], there, count=1) if verdict else there
    head = new["metadata"] if _hash(old["metadata"]) == old["m"] else old["metadata"]
    merged = _marked(head, new["text"], old["before"], old["after"])
    return merged.replace(f"metadata {_hash(head)}", f"metadata {new['m']}", 1) if head != new["metadata"] else merged


__all__ = ["CARD", "mark_verified", "write_card"]
