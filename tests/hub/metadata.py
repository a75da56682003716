"""What the Hub says of a card's metadata: the rules of its documentation that it is known to enforce.

Source: the Hub's model card specification (hub-docs, `modelcard.md`) and its list of licences.
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id

_LICENSES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
    other
"""
LICENSES = frozenset(_LICENSES.split())
RELATIONS = ("adapter", "merge", "quantized", "finetune")
_BLOCK = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)(?:\r?\n)?^---[ \t]*$", re.DOTALL | re.MULTILINE)
_LANGUAGE = re.compile(r"[a-z]{2,3}|multilingual|code")


class _Loader(yaml.SafeLoader):
    """Refuses a key that comes twice, as the Hub's reader does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if double := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.constructor.ConstructorError(problem=f"duplicated mapping key {double}")
        return super().construct_mapping(node, deep)


def validate(content: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about the metadata block of a README.md."""
    found = _BLOCK.search(content)
    try:
        data = yaml.load(found.group(1), _Loader) if found else None
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"], []
    if data is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return ["metadata must be a YAML mapping"], []
    return [problem for check in (_plain, _license, _repositories, _results) for problem in check(data)], []


def card_data(content: str) -> dict[str, Any]:
    """The metadata itself, {} where there is none."""
    found = _BLOCK.search(content)
    return (yaml.safe_load(found.group(1)) or {}) if found else {}


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _plain(data: dict[str, Any]) -> Iterator[str]:
    for name in ("library_name", "pipeline_tag", "license_name", "license_link"):
        if name in data and not isinstance(data[name], str):
            yield f'"{name}" must be a string'
    for number, tag in enumerate(_items(data.get("tags"))):
        if not isinstance(tag, str):
            yield f'"tags[{number}]" must be a string'
    if "tags" in data and not isinstance(data["tags"], list):
        yield '"tags" must be an array'
    for number, language in enumerate(_items(data.get("language"))):
        if not isinstance(language, str) or not _LANGUAGE.fullmatch(language):
            yield (
                f'"language[{number}]" with value {language!r} is not valid. It must be an ISO 639-1, 639-2 or 639-3 '
                f'code (two/three letters), or a special value like "code", "multilingual".'
            )


def _license(data: dict[str, Any]) -> Iterator[str]:
    for given in _items(data.get("license")):
        if given not in LICENSES:
            yield f'"license" must be one of [{", ".join(sorted(LICENSES))}], not {given!r}'
    if data.get("base_model_relation", RELATIONS[0]) not in RELATIONS:
        yield f'"base_model_relation" must be one of {RELATIONS}'


def _repositories(data: dict[str, Any]) -> Iterator[str]:
    for name in ("base_model", "datasets"):
        for given in _items(data.get(name)):
            try:
                validate_repo_id(given)
            except HFValidationError:
                kind = "models" if name == "base_model" else "datasets"
                yield f'"{name}" with value {given!r} is not valid. Use an id from https://hf.co/{kind}.'


def _results(data: dict[str, Any]) -> Iterator[str]:
    if not isinstance(data.get("model-index", []), list):
        yield '"model-index" must be an array'
        return
    for number, model in enumerate(data.get("model-index", [])):
        here = f"model-index[{number}]"
        yield from _required(model, here, ("name",))
        for place, result in enumerate(_items(model.get("results")) if isinstance(model, dict) else []):
            there = f"{here}.results[{place}]"
            if not isinstance(result, dict):
                yield f'"{there}" must be an object'
                continue
            yield from _required(result.get("task"), f"{there}.task", ("type",))
            yield from _required(result.get("dataset"), f"{there}.dataset", ("type", "name"))
            if not _items(result.get("metrics")):
                yield f'"{there}.metrics" is required'
            for metric_place, metric in enumerate(_items(result.get("metrics"))):
                yield from _required(metric, f"{there}.metrics[{metric_place}]", ("type", "value"))
            if "source" in result:
                yield from _required(result["source"], f"{there}.source", ("url",))


def _required(given: Any, where: str, names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        if not isinstance(given, dict) or given.get(name) is None:
            yield f'"{where}.{name}" is required'
