"""The ONNX graph in ONNX Runtime: any length, batch, padding and cache, against the float64 reference."""

from pathlib import Path
from typing import Any

import numpy
import onnx
import pytest
import torch

import export_onnx
from export_onnx import Runner
from tests.examples.finetuning import write_checkpoint
from tests.model.cases import assert_close, build, config_of, documents, expected
from tests.model.feeding import pad

pytestmark = pytest.mark.slow
CASE = "twelve_grouped"  # trained on 32 tokens
LENGTHS = (2, 40, 301)
BOUND = 1e-5


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx.export_onnx(build(CASE, torch.float32), path)
    return path


@pytest.fixture
def runner(graph: Path) -> Runner:
    return Runner(graph, config_of(CASE))


def read_in_pieces(runner: Runner, text: torch.Tensor, size: int) -> torch.Tensor:
    runner.start(1)
    stops = range(size, len(text) + size, size)
    pieces = [runner.read(text[None, stop - size : stop], torch.ones(1, min(stop, len(text))).long()) for stop in stops]
    return torch.cat(pieces, dim=1)[0]


@pytest.mark.parametrize("length", LENGTHS)
def test_whole_by_token_and_in_pieces(runner: Runner, length: int) -> None:
    text = documents(length)[0]
    truth = expected(CASE, text).logits
    assert_close(runner.read_whole(text[None], torch.ones_like(text[None]))[0], truth, BOUND)
    assert_close(runner.read_by_token(text[None])[0], truth, BOUND)
    assert_close(read_in_pieces(runner, text, 7), truth, BOUND)


@pytest.mark.parametrize("side", ["left", "right", "interior"])
def test_padded_batches_with_and_without_a_cache(runner: Runner, side: str) -> None:
    texts = documents(9, 50, 31)
    ids, mask = pad(texts, side)
    whole = runner.read_whole(ids, mask)
    runner.start(len(texts))
    cut = ids.shape[1] // 2
    steps = [runner.read(ids[:, :cut], mask[:, :cut])]
    steps += [runner.read(ids[:, stop - 1 : stop], mask[:, :stop]) for stop in range(cut + 1, ids.shape[1] + 1)]
    for logits in (whole, torch.cat(steps, dim=1)):
        for row, text in enumerate(texts):
            assert_close(logits[row, mask[row].bool()], expected(CASE, text).logits, BOUND)


@pytest.mark.parametrize("factor", [0.0, -1.0, 1.01])
def test_a_graph_with_other_slopes_is_noticed(graph: Path, tmp_path: Path, factor: float) -> None:
    changed, slopes = onnx.load(graph), [2.0 ** -(k / 2) for k in range(1, 17)]
    bent = [tensor for tensor in changed.graph.initializer if holds_slopes(tensor, slopes)]
    assert bent
    for tensor in bent:
        tensor.CopyFrom(
            onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * numpy.float32(factor), tensor.name)
        )
    onnx.save(changed, tmp_path / "bent.onnx")
    runner, text = Runner(tmp_path / "bent.onnx", config_of(CASE)), documents(40)[0]
    truth = expected(CASE, text).logits
    for logits in (runner.read_whole(text[None], torch.ones_like(text[None])), runner.read_by_token(text[None])):
        with pytest.raises(AssertionError, match="of the largest value"):
            assert_close(logits[0], truth, 3 * BOUND)


def holds_slopes(tensor: Any, slopes: list[float]) -> bool:
    """True for the twelve slopes of the case: each is a power of the root of two."""
    values = numpy.abs(onnx.numpy_helper.to_array(tensor)).ravel()
    return values.size == 12 and all(numpy.isclose(value, slopes, rtol=1e-5).any() for value in values)


def test_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_checkpoint(tmp_path / "source")
    given = ["--model", str(source), "--output", str(tmp_path / "out"), "--prompt", "the cat", "--new_tokens", "6"]
    assert export_onnx.main([*given, "--lengths", "8", "33"]) == 0
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines() if line.split()[:1] in (["8"], ["33"])]
    assert len(rows) == 2 and all(float(cell) < BOUND for row in rows for cell in row[1:])
    assert "(the same tokens as `generate`)" in shown
    assert {"model.onnx", "config.json", "tokenizer.json"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_what_it_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_checkpoint(tmp_path / "source")
    assert export_onnx.main(["--model", str(source), "--output", str(tmp_path / "out"), "--lengths", "1"]) == 2
    assert "--lengths [1]" in capsys.readouterr().err
    assert export_onnx.main(["--model", str(tmp_path / "missing"), "--output", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
