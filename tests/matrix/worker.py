"""Loads saved folders where the package is not installed, and holds what they compute against what is expected.

Runs by itself, with the standard library, torch and transformers: `python -I worker.py SOURCES FOUND.json`. Each folder
in SOURCES holds `expected.pt` and saved models, as `tests.matrix.write` makes them. Every check is one line of
FOUND.json: its group, its name, what was found, the limit, and whether it passed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = "alibi_hf"
if __name__ == "__main__" and "--hide" not in sys.argv and importlib.util.find_spec(PACKAGE) is not None:
    raise SystemExit(f"{PACKAGE} can be imported here: nothing would show that the folders stand alone.")

import huggingface_hub
import torch
import transformers
from transformers import DynamicCache, StaticCache

torch.set_num_threads(1)
BACKENDS = ("eager", "sdpa", "flex_attention")
LIMIT = {torch.float64: 1e-10, torch.float32: 1e-5}  # of the largest expected value
HALF = {torch.bfloat16: 3e-2, torch.float16: 4e-3}  # of their root mean square
SLOW = "flex_attention"  # traced anew in every call on CPU: it is held to float64, whole rows in 16 bits, no more
WORSE = 1.1  # times eager's error in 16 bits, which is all that another backend may have
TRAINED = 1e-6  # of losses and gradients: Transformers takes the loss of float32 logits
RATE = 1e-3
CAUSAL = "AutoModelForCausalLM"

Texts = list[torch.Tensor]
Check = tuple[str, str, Callable[[], tuple[float, float]]]  # group, name, () -> (found, limit)


class Hidden:
    """Refuses the package by name, for a run in an environment that has it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Raise ImportError for the package and all in it."""
        if name.split(".")[0] == PACKAGE:
            raise ImportError(f"{PACKAGE} is hidden")


def load(auto: str, folder: Path, **kwargs: Any) -> Any:
    """Return the model of a folder, by its own code alone."""
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True, **kwargs)
    module = type(model).__module__
    if not module.startswith("transformers_modules"):
        raise AssertionError(f"{folder} was loaded by {module}, not by its own code")
    return model.eval()


@cache
def causal(folder: Path, dtype: torch.dtype, backend: str) -> Any:
    """Return the causal model of a folder, which no check changes."""
    return load(CAUSAL, folder, dtype=dtype, attn_implementation=backend)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest error over the largest expected value; NaN counts as infinitely far."""
    if found.shape != expected.shape:
        raise AssertionError(f"shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    error = (found.double() - expected).abs().max() / expected.abs().max()
    return float(error.nan_to_num(float("inf")))


def furthest(found: Texts, expected: Texts) -> float:
    """Return the largest `distance` of any text."""
    return max(distance(*pair) for pair in zip(found, expected, strict=True))


# How the texts are fed; each returns the logits of every text, [tokens, vocabulary].


def whole(model: Any, texts: Texts) -> Texts:
    """Each text in one call."""
    return [model(text[None]).logits[0] for text in texts]


def token_by_token(model: Any, texts: Texts) -> Texts:
    """Each text through a growing cache, a token a call."""
    return [_decode(model, text, DynamicCache(config=model.config)) for text in texts]


def static_cache(model: Any, texts: Texts) -> Texts:
    """Each text through a cache of fixed size, a token a call."""
    return [_decode(model, text, StaticCache(config=model.config, max_cache_len=len(text) + 9)) for text in texts]


def _decode(model: Any, text: torch.Tensor, cache: Any) -> torch.Tensor:
    return torch.cat([model(token[None, None], past_key_values=cache).logits[0] for token in text])


def left_padded(model: Any, texts: Texts) -> Texts:
    """All texts in one batch, padded on the left."""
    ids, mask = padded(texts)
    logits = model(ids, attention_mask=mask).logits
    return [row[kept.bool()] for row, kept in zip(logits, mask, strict=True)]


def padded_token_by_token(model: Any, texts: Texts) -> Texts:
    """All texts in one batch, padded on the left, through a growing cache."""
    ids, mask = padded(texts)
    cache = DynamicCache(config=model.config)
    calls = [
        model(ids[:, at : at + 1], attention_mask=mask[:, : at + 1], past_key_values=cache).logits
        for at in range(ids.shape[1])
    ]
    return [row[kept.bool()] for row, kept in zip(torch.cat(calls, 1), mask, strict=True)]


def packed(model: Any, texts: Texts) -> Texts:
    """All texts in one row; positions that start again separate them."""
    positions = torch.cat([torch.arange(len(text)) for text in texts])
    logits = model(torch.cat(texts)[None], position_ids=positions[None], use_cache=False).logits[0]
    return list(logits.split([len(text) for text in texts]))


FEEDS = (whole, token_by_token, static_cache, left_padded, padded_token_by_token, packed)


def padded(texts: Texts) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask of a batch that is padded on the left, and past its longest row."""
    width = max(len(text) for text in texts) + 3
    ids, mask = torch.zeros(len(texts), width, dtype=torch.long), torch.zeros(len(texts), width, dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, width - len(text) :], mask[row, width - len(text) :] = text, 1
    return ids, mask


# The checks.


def heads(source: Path, expected: dict[str, Any], backends: Sequence[str]) -> Iterator[Check]:
    """Every head loads, and computes what is expected."""
    for auto, folder in expected["folders"].items():

        def computes(auto: str = auto, folder: str = folder) -> tuple[float, float]:
            model = load(auto, source / folder, dtype=torch.float64)
            return furthest(outputs(model, expected["texts"]), expected["heads"][auto]), LIMIT[torch.float64]

        yield "heads", auto, computes


def outputs(model: Any, texts: Texts) -> Texts:
    """Return what a head computes of each text: its hidden states or logits, start and end side by side."""
    found = [model(text[None]) for text in texts]
    if hasattr(found[0], "start_logits"):
        return [torch.stack((each.start_logits[0], each.end_logits[0]), dim=-1) for each in found]
    return [(each.logits if hasattr(each, "logits") else each.last_hidden_state)[0] for each in found]


def agreement(source: Path, expected: dict[str, Any], backends: Sequence[str]) -> Iterator[Check]:
    """Every way of feeding, in every backend, gives the expected logits."""
    for dtype, limit in LIMIT.items():
        for backend in backends:
            for feed in FEEDS:
                if backend == SLOW and dtype != torch.float64:
                    continue

                def agrees(dtype: Any = dtype, limit: float = limit, backend: str = backend, feed: Any = feed) -> Any:
                    model = causal(source / expected["causal"], dtype, backend)
                    return furthest(feed(model, expected["texts"]), expected["logits"]), limit

                yield "agree", f"{str(dtype)[6:]}, {backend}, {feed.__name__}", agrees


def sixteen_bits(source: Path, expected: dict[str, Any], backends: Sequence[str]) -> Iterator[Check]:
    """In 16 bits eager is near, and the others are as near as eager."""
    truth = torch.cat(expected["logits"])
    size = float(truth.square().mean().sqrt())

    def error(dtype: torch.dtype, backend: str) -> float:
        found = torch.cat(whole(causal(source / expected["causal"], dtype, backend), expected["texts"])).double()
        return float((found - truth).square().mean().sqrt().nan_to_num(float("inf")))

    for dtype, limit in HALF.items():
        for backend in backends:

            def is_near(dtype: Any = dtype, limit: float = limit, backend: str = backend) -> tuple[float, float]:
                most = limit * size
                if backend != "eager":
                    most = min(most, WORSE * error(dtype, "eager"))
                return error(dtype, backend), most

            yield "agree", f"{str(dtype)[6:]}, {backend}, whole", is_near


def generation(source: Path, expected: dict[str, Any], backends: Sequence[str]) -> Iterator[Check]:
    """Greedy tokens are the expected ones: one text at a time, a padded batch, and a cache of fixed size."""
    texts, written = expected["texts"], torch.stack(expected["written"])
    new = written.shape[1]
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    for backend in (each for each in backends if each != SLOW):
        for name, static in (("growing cache", {}), ("static cache", {"cache_implementation": "static"})):

            def alone(backend: str = backend, static: dict = static) -> tuple[float, float]:
                model = causal(source / expected["causal"], torch.float32, backend)
                rows = [model.generate(text[None], **settings, **static)[0, -new:] for text in texts]
                return float((torch.stack(rows) != written).sum()), 0.0

            def batch(backend: str = backend, static: dict = static) -> tuple[float, float]:
                model, (ids, mask) = causal(source / expected["causal"], torch.float32, backend), padded(texts)
                rows = model.generate(ids, attention_mask=mask, **settings, **static)
                return float((rows[:, -new:] != written).sum()), 0.0

            yield "generate", f"{backend}, alone, {name}", alone
            yield "generate", f"{backend}, left-padded batch, {name}", batch


def training(source: Path, expected: dict[str, Any], backends: Sequence[str]) -> Iterator[Check]:
    """Loss, gradients and the loss after one step of gradient descent are the expected ones."""
    step, text = expected["step"], expected["texts"][-1][None]

    def gradients() -> tuple[float, float]:
        model = load(CAUSAL, source / expected["causal"], dtype=torch.float64).train()
        model(text, labels=text).loss.backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters()}
        if found.keys() != step["gradients"].keys():
            raise AssertionError(f"gradients on one side only: {sorted(found.keys() ^ step['gradients'].keys())}")
        most = max(truth.abs().max() for truth in step["gradients"].values())
        errors = [  # a key's bias changes nothing: its gradient is zero but for rounding
            (found[name] - truth).abs().max() / truth.abs().max().clamp(min=1e-3 * most)
            for name, truth in step["gradients"].items()
        ]
        return float(torch.stack(errors).max().nan_to_num(float("inf"))), TRAINED

    def losses() -> tuple[float, float]:
        model = load(CAUSAL, source / expected["causal"], dtype=torch.float64).train()
        before = model(text, labels=text).loss
        before.backward()
        torch.optim.SGD(model.parameters(), lr=RATE).step()
        with torch.no_grad():
            after = model(text, labels=text).loss
        return distance(torch.stack((before.detach(), after)), torch.stack((step["before"], step["after"]))), TRAINED

    yield "train", "gradients", gradients
    yield "train", "loss before and after a step", losses


def saving(source: Path, expected: dict[str, Any], backends: Sequence[str]) -> Iterator[Check]:
    """Every head saves a folder that is complete again, and loads from it with the same weights and outputs."""
    for auto, folder in expected["folders"].items():

        def again(auto: str = auto, folder: str = folder) -> tuple[float, float]:
            first = load(auto, source / folder)
            with tempfile.TemporaryDirectory(prefix=f"{folder}-") as made:
                first.save_pretrained(made)
                lost = {path.name for path in (source / folder).glob("*.py")} - set(map(_name, Path(made).iterdir()))
                maps = [
                    json.loads((Path(at) / "config.json").read_text())["auto_map"] for at in (source / folder, made)
                ]
                if lost or maps[0] != maps[1] or len(maps[1]) != 6:
                    raise AssertionError(f"saved without {sorted(lost)}, auto_map {maps[1]}")
                second = load(auto, Path(made))
            state, other = first.state_dict(), second.state_dict()
            if state.keys() != other.keys() or any(not torch.equal(state[name], other[name]) for name in state):
                raise AssertionError("the weights are others")
            return furthest(outputs(second, expected["texts"]), outputs(first, expected["texts"])), 0.0

        yield "save", auto, again


def _name(path: Path) -> str:
    return path.name


CHECKS = (heads, agreement, sixteen_bits, generation, training, saving)


def run(source: Path, backends: Sequence[str]) -> list[dict[str, Any]]:
    """Return every check of one folder; one that raises has failed, and says why."""
    causal.cache_clear()
    expected = torch.load(source / "expected.pt")
    found = []
    for checks in CHECKS:
        for group, name, check in checks(source, expected, backends):
            line = {"group": group, "check": name, "found": None, "limit": None, "passed": False, "error": ""}
            try:
                with torch.set_grad_enabled(group == "train"):
                    line["found"], line["limit"] = check()
                line["passed"] = line["found"] <= line["limit"]
            except Exception:  # whatever it is, the table has to say so
                line["error"] = traceback.format_exc(limit=-3)
            found.append(line)
    return found


def versions() -> dict[str, str]:
    """Return the versions that ran, Python's without its last number, torch's without its build."""
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
        "huggingface_hub": huggingface_hub.__version__,
    }


def main() -> None:
    """Check every folder in SOURCES, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sources", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--hide", action="store_true", help="run where the package is installed, and refuse it")
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    given = parser.parse_args()
    if given.hide:
        sys.meta_path.insert(0, Hidden())
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folders = sorted(path.parent for path in given.sources.glob("*/expected.pt"))
    found = {"versions": versions(), "sources": {folder.name: run(folder, given.backends) for folder in folders}}
    given.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
