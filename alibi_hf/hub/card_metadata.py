"""The metadata of a card, as the Hub validates it (hub-docs, "Model Cards" and its `modelcard.md`).

* Licence, language and data sets are the source's own words. What it does not say is left out.
* `base_model` is set, `base_model_relation` is not: it is one of finetune, adapter, merge and quantized, and a
  conversion is none of them.
* Perplexities go into `model-index`. The Hub's `.eval_results` files are for benchmarks that it lists, and a text of
  the reader's own is none.
"""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from alibi_hf.evaluation.findings import finite_perplexity
from alibi_hf.hub.card_facts import EVALUATION, CardFacts

HUB = "https://huggingface.co"
LIBRARY = "transformers"
TOOL = "alibi-hf evaluate"
# The licence identifiers of the Hub (hub-docs, "Licenses"). What is none of them is `other`, with its name.
LICENCES = frozenset(Path(__file__).with_name("licences.txt").read_text(encoding="utf-8").split())
_LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")  # ISO 639, and two words that the Hub has
_DATASET = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def metadata(facts: CardFacts, repo_id: str | None, commit: str | None) -> ModelCardData:
    """Return the metadata of a folder's card.

    Args:
        facts: of the folder.
        repo_id: where it is on the Hub, if it is; results name it as their source.
        commit: the commit to pin, if there is one.
    """
    said, results = facts.source.get("card", {}), _results(facts, repo_id, commit)
    name = repo_id.split("/")[-1] if repo_id else facts.source_name or "model"
    return ModelCardData(
        **_licence(facts, said),
        language=_words(said.get("language"), _LANGUAGE),
        datasets=_words(said.get("datasets"), _DATASET),
        base_model=facts.base_model,
        library_name=LIBRARY,
        pipeline_tag=facts.task,
        tags=["alibi", *([facts.family] if facts.family else [])],
        model_name=name if results else None,
        eval_results=results or None,
        metrics=["perplexity"] if results else None,
    )


def _licence(facts: CardFacts, said: dict[str, Any]) -> dict[str, Any]:
    """The fields of the licence. A name that the Hub does not list becomes `other` with that name."""
    given = said.get("license")
    if isinstance(given, list):
        known = [name for name in given if name in LICENCES]
        given = known if len(known) > 1 else (known or given or [None])[0]
    if not given:
        return {}
    found: dict[str, Any] = {"license": given, "license_name": said.get("license_name")}
    if isinstance(given, str) and given not in LICENCES:
        found = {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", given.lower()).strip("-") or None}
    return {**found, "license_link": _link(facts, said.get("license_link"))}


def _link(facts: CardFacts, link: Any) -> str | None:
    """A licence's address: as given, or that of a file here or in the source's repository."""
    if not isinstance(link, str):
        return None
    if link.startswith(("https://", "http://")) or link in facts.licences:
        return link
    inside = re.fullmatch(r"[\w.-]+", link) is not None
    return f"{HUB}/{facts.base_model}/blob/{facts.source['revision']}/{link}" if facts.base_model and inside else None


def _words(given: Any, pattern: re.Pattern[str]) -> list[str] | None:
    """What of `given` the Hub takes, as a list."""
    entries = given if isinstance(given, list) else [given] if given else []
    return [entry for entry in entries if pattern.fullmatch(entry)] or None


def _results(facts: CardFacts, repo_id: str | None, commit: str | None) -> list[EvalResult]:
    """One result a length and protocol that gave a number. The revision of a text is the SHA-256 of its files."""
    if facts.reading is None or facts.evaluation is None:
        return []
    texts = facts.evaluation.text
    address = f"{HUB}/{repo_id}/blob/{commit or 'main'}/{EVALUATION}" if repo_id else None
    return [
        EvalResult(
            task_type=facts.task,
            task_name="Language modelling",
            dataset_type="text",
            dataset_name=", ".join(text["name"] for text in texts),
            dataset_revision=", ".join(text["sha256"] for text in texts),
            dataset_config=f"{reading.protocol} windows",
            metric_type="perplexity",
            metric_name=f"perplexity, {reading.length} tokens",
            metric_value=float(f"{perplexity:.6g}"),
            metric_args={"length": reading.length, "stride": reading.stride, "dtype": facts.reading.dtype},
            source_name=TOOL if address else None,
            source_url=address,
        )
        for reading in facts.reading.readings
        if (perplexity := finite_perplexity(reading)) is not None
    ]


__all__ = ["HUB", "metadata"]
