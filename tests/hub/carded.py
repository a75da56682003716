"""What the tests of cards share: a folder to make a card of, and what a reader's Markdown makes of it."""

import json
import re
import shutil
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt

from alibi_hf import Evaluation, convert
from alibi_hf.compact import compact_json
from alibi_hf.verification.report import Check, Control, Verification
from tests import builders
from tests.scratch import scratch_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@cache
def _converted(family: str, with_tokenizer: bool) -> Path:
    folder = scratch_folder("card-")
    source = getattr(builders, family)(folder / f"tiny-{family}", raw={"seq_length": 64} if family == "bloom" else {})
    if with_tokenizer:
        builders.tokenizer(source)
    convert(source, folder / "output", verify=False)
    return folder / "output"


def converted(folder: Path, family: str = "bloom", with_tokenizer: bool = True) -> Path:
    """A conversion without verification, to change at will; the weights are as old as the record."""
    shutil.copytree(_converted(family, with_tokenizer), folder)
    return folder


def change(path: Path, **values: object) -> None:
    """Set fields of a JSON object in a file, and leave the file as old as it was."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def prove(folder: Path, proved: bool = True) -> None:
    """A verification as it is written, of a few lines, and the record that says so."""
    checks = [
        Check("tensors", "float32", 0, 0.0, None, 0.0, True, metric="differ"),
        *(Check("layer", "float32", 40, 1e-6 * (layer + 1), 1e-5, 2e-5, True, layer=layer) for layer in range(3)),
        Check("logits", "float32", 40, 1.2e-5, 2.5e-5, 5e-5, proved),
        Check("upstream | as it stands", "float64", 40, None, 4.9e-6, None, True),
    ]
    report = Verification(
        source=str(folder.parent / "tiny-bloom"),
        output=str(folder),
        family="bloom",
        reference={"class": "transformers.BloomForCausalLM", "attn_implementation": "eager", "truth": "in float64"},
        text="random ids, seed 1108",
        checks=checks,
        negative_controls=[Control("slope of one head times 1.05", "logits", 0.4, 5e-5, True)],
        versions={"torch": "2.13.0", "transformers": "5.23.0"},
    )
    (folder / "verification.json").write_text(compact_json(report.to_dict()))  # without the page, which takes seconds


def measure(folder: Path, report: Evaluation) -> None:
    """An evaluation as it is written, with a picture by name alone."""
    (folder / "evaluation.json").write_text(compact_json(report.to_dict()))
    (folder / "evaluation.png").touch()


def blocks(card: str) -> list[str]:
    """The Python of a card."""
    return re.findall(r"^```python\n(.*?)^```", card, re.MULTILINE | re.DOTALL)


def body(card: str) -> str:
    """A card without its metadata."""
    return card.split("\n---\n", 1)[1]


def tokens(text: str) -> list[tuple[str, str]]:
    """Kind and content of everything that GitHub's Markdown finds in a text, outside comments."""
    found = []
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text):
        found += [(part.type, part.content) for part in (token.children or [token])]
    return [(kind, content) for kind, content in found if not content.strip().startswith("<!-- ")]
