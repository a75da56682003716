"""Writes the folders that `worker.py` reads, and what has to come out of them: `python tests/matrix/write.py OUT NAME`.

Runs where the package is installed. One folder holds the five heads as `save_pretrained` writes them, one a converted
checkpoint. What is expected comes from the plain float64 decoder of `tests/references/`, which shares no code with
the package.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # after the installed package: a source tree must not stand in for it
    sys.path[0] = ""
    sys.path = [entry for entry in sys.path if entry] + [str(Path(__file__).parents[2])]

import torch
from safetensors.torch import load_file

import alibi_hf
from tests import builders
from tests.model.cases import build, documents
from tests.references.decoder import Decoded, decode

RATE = 1e-3  # of the step of gradient descent, as in worker.py
NEW = 12  # tokens to generate
CAUSAL = "AutoModelForCausalLM"
TEXTS = documents(20, 50)  # the second is longer than any of the models was trained on
# Slopes of 12, 6 and 40 heads follow no single power of two.
HEADS = {
    "AutoModel": ("multi_query", alibi_hf.AlibiModel),
    CAUSAL: ("twelve_grouped", alibi_hf.AlibiForCausalLM),
    "AutoModelForSequenceClassification": ("six", alibi_hf.AlibiForSequenceClassification),
    "AutoModelForTokenClassification": ("forty", alibi_hf.AlibiForTokenClassification),
    "AutoModelForQuestionAnswering": ("own_slopes", alibi_hf.AlibiForQuestionAnswering),
}

State = Mapping[str, torch.Tensor]


def write_saved(folder: Path) -> None:
    """Save a model a head, and what each computes of the texts."""
    heads, folders = {}, {}
    for auto, (case, cls) in HEADS.items():
        model = build(case, torch.float32, cls=cls)
        folders[auto] = auto.lower()
        model.save_pretrained(folder / folders[auto])
        heads[auto] = [expected_head(auto, model.state_dict(), model.config.to_dict(), text) for text in TEXTS]
    causal = build(HEADS[CAUSAL][0], torch.float32)
    torch.save(
        {"folders": folders, "heads": heads, **expected_causal(folders[CAUSAL], causal.state_dict(), causal.config)},
        folder / "expected.pt",
    )


def write_converted(folder: Path) -> None:
    """Convert a BLOOM of six heads; the folder loads as a causal model and as the bare decoder."""
    raw = {"seq_length": 32, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    source = builders.bloom(folder / "source", raw=raw)
    alibi_hf.convert(source, folder / "out", verify=False)
    state = load_file(folder / "out" / "model.safetensors")
    config = alibi_hf.AlibiConfig.from_pretrained(folder / "out")
    fields = config.to_dict()
    folders = dict.fromkeys((CAUSAL, "AutoModel"), "out")
    heads = {auto: [expected_head(auto, state, fields, text) for text in TEXTS] for auto in folders}
    torch.save({"folders": folders, "heads": heads, **expected_causal("out", state, config)}, folder / "expected.pt")


def expected_head(auto: str, state: State, fields: dict[str, Any], text: torch.Tensor) -> torch.Tensor:
    """Return what a head computes of one text, in float64."""
    if auto == "AutoModel" and "embed_tokens.weight" in state:
        state = {f"model.{name}": tensor for name, tensor in state.items()}
    decoded: Decoded = decode(state, fields, text)
    if auto in ("AutoModel", CAUSAL):
        return decoded.hidden if auto == "AutoModel" else decoded.logits
    name = "qa_outputs" if auto == "AutoModelForQuestionAnswering" else "score"
    found = decoded.hidden @ state[f"{name}.weight"].double().T
    if f"{name}.bias" in state:
        found = found + state[f"{name}.bias"].double()
    return found[-1] if auto == "AutoModelForSequenceClassification" else found


def expected_causal(folder: str, state: State, config: Any) -> dict[str, Any]:
    """Return texts, logits, greedy tokens and a training step of a causal model."""
    fields = config.to_dict()
    return {
        "causal": folder,
        "texts": TEXTS,
        "logits": [decode(state, fields, text).logits for text in TEXTS],
        "written": [greedy(state, fields, text) for text in TEXTS],
        "step": training_step(state, fields, TEXTS[-1]),
    }


def greedy(state: State, fields: dict[str, Any], text: torch.Tensor) -> torch.Tensor:
    """Return the next tokens, each the likeliest; no choice may be so close that float32 could take another."""
    start = len(text)
    for _ in range(NEW):
        best = decode(state, fields, text).logits[-1].topk(2)
        assert best.values[0] - best.values[1] > 1e-3 * best.values[0].abs(), "too close: take other texts"
        text = torch.cat([text, best.indices[:1]])
    return text[start:]


def training_step(state: State, fields: dict[str, Any], text: torch.Tensor) -> dict[str, Any]:
    """Return gradients, and the loss before and after one step of gradient descent."""
    leaves = {name: tensor.double().requires_grad_() for name, tensor in state.items()}
    if fields["tie_word_embeddings"]:
        leaves.pop("lm_head.weight", None)
    before = loss(leaves, fields, text)
    gradients = dict(zip(leaves, torch.autograd.grad(before, list(leaves.values())), strict=True))
    stepped = {name: tensor.detach() - RATE * gradients[name] for name, tensor in leaves.items()}
    after = loss(stepped, fields, text)
    return {"before": before.detach(), "after": after, "gradients": gradients}


def loss(state: State, fields: dict[str, Any], text: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of predicting each token from those before it."""
    return torch.nn.functional.cross_entropy(decode(state, fields, text).logits[:-1], text[1:])


def write_all(folder: Path, name: str) -> None:
    """Write NAME-saved and NAME-converted into `folder`."""
    for kind, write in (("saved", write_saved), ("converted", write_converted)):
        place = folder / f"{name}-{kind}"
        place.mkdir(parents=True)
        write(place)


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_all(Path(sys.argv[1]), sys.argv[2])
