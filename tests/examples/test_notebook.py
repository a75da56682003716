"""`length_laboratory.ipynb` runs from top to bottom, and what it shows is what the package computes.

python -m tests.examples.test_notebook        # runs it, and writes its outputs anew
"""

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from transformers import AutoTokenizer

from alibi_hf import AlibiForCausalLM
from alibi_hf.evaluation import perplexity_by_length

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "length_laboratory.ipynb"
BLOOM = EXAMPLES / "checkpoints" / "sotu-bloom"
LENGTHS = [128, 256, 512, 1024, 2048]
ABSOLUTE = re.compile(r"(?<![\w./:<-])(/\w[\w.-]*){2,}|[A-Z]:\\")  # a path such as /home/me, or C:\


def execute() -> Any:
    """Return the notebook with the outputs of a run, those to stderr left out: warnings name the machine's files."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    options = {"kernel_name": "python3", "timeout": 600, "record_timing": False}
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "IPYTHONDIR": folder, "OMP_NUM_THREADS": "1"}
        client = NotebookClient(notebook, resources={"metadata": {"path": str(EXAMPLES)}}, **options)
        client.execute(env=environment)
    for cell in code(notebook):
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: Any) -> Iterator[Any]:
    return (output for cell in code(notebook) for output in cell.outputs)


def printed(notebook: Any) -> str:
    return "".join(output.text for output in outputs(notebook) if output.output_type == "stream")


def row(notebook: Any, name: str) -> list[float]:
    """Return the numbers of the line that begins with `name`; what fails is infinite."""
    (line,) = re.findall(rf"^{re.escape(name)} +(.*)$", printed(notebook), re.MULTILINE)
    return [float("inf") if word == "fails" else float(word) for word in line.split()]


@pytest.fixture(scope="module")
def committed() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    from texts import load_texts

    tokenizer = AutoTokenizer.from_pretrained(BLOOM)
    text = "\n\n".join(load_texts().held_out)[:20_000]
    return tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]


@pytest.fixture(scope="module")
def model() -> AlibiForCausalLM:
    return AlibiForCausalLM.from_pretrained(BLOOM, dtype=torch.float32, attn_implementation="eager").eval()


def test_the_committed_notebook_has_its_outputs_and_names_no_machine(committed: Any) -> None:
    nbformat.validate(committed)
    assert [cell.execution_count for cell in code(committed)] == list(range(1, len(code(committed)) + 1))
    assert all(output.output_type in ("stream", "display_data") for output in outputs(committed))
    assert all(output.name == "stdout" for output in outputs(committed) if output.output_type == "stream")
    pictures = [output.data["image/png"] for output in outputs(committed) if output.output_type == "display_data"]
    assert len(pictures) == 3 and NOTEBOOK.stat().st_size < 300_000
    text = "\n".join([cell.source for cell in committed.cells] + [printed(committed), str(committed.metadata)])
    assert not (found := ABSOLUTE.search(text)), text[found.start() - 40 : found.end() + 40]
    assert all(map(ABSOLUTE.search, ("in /home/me/file", 'File "/opt/x.py"', "C:\\Users")))


def test_its_perplexities_are_the_packages(committed: Any, model: AlibiForCausalLM, tokens: torch.Tensor) -> None:
    shown = row(committed, "BLOOM, here      non-overlapping")
    truth = perplexity_by_length(model, tokens[:2048], LENGTHS[::2])  # as many as one window of the longest length has
    assert len(shown) == len(LENGTHS) and shown[::2] == pytest.approx(list(truth.values()), abs=0.006)
    for protocol in ("non-overlapping", "sliding"):
        assert row(committed, f"BLOOM, upstream  {protocol}") == row(committed, f"BLOOM, here      {protocol}")
        assert row(committed, f"MPT, upstream    {protocol}")[2:] == [float("inf")] * 3


@torch.no_grad()
def test_its_distances_are_those_of_the_attention(
    committed: Any, model: AlibiForCausalLM, tokens: torch.Tensor
) -> None:
    attentions = torch.cat(model(tokens[None, :1024], output_attentions=True, use_cache=False).attentions)
    place = torch.arange(1024)
    distance = (attentions * (place[:, None] - place)).sum(-1).mean()
    assert f"mean distance {distance:.1f} tokens" in printed(committed)


@pytest.mark.slow
def test_it_runs_from_top_to_bottom_and_shows_the_same(committed: Any) -> None:
    fresh = execute()
    for name in ("BLOOM, here", "MPT, here"):
        for protocol in ("non-overlapping", "sliding"):
            line = f"{name:16} {protocol}"
            assert row(fresh, line) == pytest.approx(row(committed, line), rel=2e-3), line
    for notebook in (fresh, committed):
        alibi, rope = (row(notebook, name) for name in ("ALiBi ", "RoPE"))
        assert alibi[-1] < 1.01 * alibi[0] and rope[-1] > 1.1 * rope[0]
        written = row(notebook, "written, bits_per_byte")
        assert written[2] < 1.25 * written[0]
    assert row(fresh, "real, bits_per_byte") == pytest.approx(row(committed, "real, bits_per_byte"), abs=0.011)
    assert len(list(outputs(fresh))) == len(list(outputs(committed)))


if __name__ == "__main__":
    nbformat.write(execute(), NOTEBOOK)
