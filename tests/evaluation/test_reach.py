"""The verb: what it reads and refuses, and its files, which all say the same."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
import shutil
import sys
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from alibi_hf import AlibiConfig, AlibiError, AlibiForCausalLM, ConfigFieldError, Reach, UnknownFamilyError, reach
from alibi_hf.cli import app
from alibi_hf.display import render
from alibi_hf.evaluation.bias_alone import BiasRounding
from alibi_hf.evaluation.measure_reach import measure_reach
from alibi_hf.evaluation.reach_files import COLUMNS
from alibi_hf.evaluation.reach_page import as_page
from alibi_hf.evaluation.reach_report import HeadReach
from alibi_hf.evaluation.reach_table import HEADS, head_cells
from alibi_hf.evaluation.reach_words import findings
from alibi_hf.evaluation.text import open_texts, tokenize
from alibi_hf.pages import heat_map
from tests import builders
from tests.pages import HOSTILE, Page, assert_can_be_read_by_anyone, assert_needs_nothing_else

SOURCE = "examples/checkpoints/sotu-mpt"
LENGTHS = [64, 300]


@pytest.fixture(scope="module")
def report() -> Reach:
    return reach(SOURCE, lengths=LENGTHS)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Return a BLOOM of two layers with a tokenizer of one token a character."""
    return builders.tokenizer(builders.bloom(tmp_path / "tiny"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("we hold these truths to be self-evident " * 10, encoding="utf-8")
    return path


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


def test_it_reads_the_first_tokens_of_the_text_in_its_own_layout_or_upstreams(report: Reach, tmp_path: Path) -> None:
    model = AlibiForCausalLM.from_pretrained(SOURCE, dtype=torch.float32)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SOURCE)
    text = Path("alibi_hf/verification/sotu.txt")
    ids = torch.tensor(tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"])
    direct = measure_reach(model, ids, LENGTHS)
    assert [found.heads for found in report.lengths] == [found.heads for found in direct]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    own = reach(tmp_path, text, lengths=[300, 64, 64])
    assert [found.heads for found in own.lengths] == [found.heads for found in direct]
    assert report.model["layers"] == 6 and report.model["heads"] == 6 and report.dtype == "float32"
    assert report.text == [file.to_dict() for file in open_texts([text])]


def test_windows_are_those_of_the_dtype(report: Reach) -> None:
    rough = reach(SOURCE, lengths=[300], dtype="bfloat16").longest
    assert rough.saved > report.longest.saved
    assert all(a.window <= b.window for a, b in zip(rough.heads, report.longest.heads, strict=True))
    for a, b in zip(rough.heads, report.longest.heads, strict=True):
        assert a.mean_distance == pytest.approx(b.mean_distance, rel=0.05)


def test_lengths_that_the_text_does_not_have_are_left_out_and_said(tiny: Path, text: Path) -> None:
    found = reach(tiny, text, lengths=[100, 5000])
    assert [length.length for length in found.lengths] == [100]
    assert found.notes == ["Left out: 5000 tokens; the text has 400."]
    default = reach(tiny, text)
    assert [length.length for length in default.lengths] == [256] and "1024, 4096" in default.notes[0]
    text.write_text("a short one", encoding="utf-8")
    whole = reach(tiny, text)
    assert [length.length for length in whole.lengths] == [11]
    assert whole.notes == ["The text has 11 tokens, and was read whole."]


def test_one_text_may_be_several_files(tiny: Path, text: Path) -> None:
    other = text.with_name("other.txt")
    other.write_text("and another", encoding="utf-8")
    found = reach(tiny, [text, other], lengths=[405])
    assert [file["name"] for file in found.text] == ["text.txt", "other.txt"]


def change(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def without_tokenizer(folder: Path, text: Path) -> None:
    (folder / "tokenizer.json").unlink()


def another_tokenizer(folder: Path, text: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(SOURCE) / name, folder / name)


def empty(folder: Path, text: Path) -> None:
    text.write_text("\n \n")


def latin(folder: Path, text: Path) -> None:
    text.write_bytes("déjà vu ".encode("latin-1") * 99)


def short(folder: Path, text: Path) -> None:
    text.write_text("short")


def missing(folder: Path, text: Path) -> None:
    text.unlink()


def nan(folder: Path, text: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "h.1.self_attention.query_key_value.weight" in name)
    tensors[name][:] = math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def gpt2(folder: Path, text: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    for path in folder.glob("*.safetensors"):
        path.unlink()
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)).save_pretrained(folder)


def no_alibi(folder: Path, text: Path) -> None:
    config = AlibiConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, alibi=False)
    AlibiForCausalLM(config).save_pretrained(folder)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without_tokenizer, "tokenizer"),
        (another_tokenizer, "embeddings"),
        (empty, "is empty"),
        (latin, "not UTF-8"),
        (short, "has 5 tokens, and 100 are asked for"),
        (missing, "cannot be read"),
        (nan, "layer 1, heads 0, 1, 2, 3, 4, 5, is not finite"),
        (gpt2, "UnknownFamilyError"),
        (no_alibi, "alibi=False"),
    ],
)
def test_bad_input_exits_2_with_one_line_and_leaves_nothing(
    spoil: Any, words: str, tiny: Path, text: Path, tmp_path: Path
) -> None:
    spoil(tiny, text)
    before = sorted(path.name for path in tmp_path.iterdir())
    status, out, err = run("reach", tiny, "--text", text, "--lengths", "100", "--output", tmp_path / "out", "--quiet")
    assert (status, out) == (2, "")
    assert words in err and err.count("\n") == 1, err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--lengths", "1"], "--lengths 1"),
        (["--device", "nope"], "nope"),
        (["--dtype", "int3"], "int3"),
        (["--output", "FULL"], "overwrite"),
        (["--output", "SOURCE", "--overwrite"], "would replace the source"),
        (["--output", "PARENT", "--overwrite"], "would replace the source"),
    ],
)
def test_bad_options_exit_2(options: list[str], words: str, tiny: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a file").write_text("x")
    places = {"FULL": tmp_path / "full", "SOURCE": tiny, "PARENT": tmp_path}
    status, _, err = run("reach", tiny, "--text", text, *(places.get(option, option) for option in options))
    assert status == 2 and words in err and "Traceback" not in err
    assert (tmp_path / "full" / "a file").read_text() == "x" and (tiny / "config.json").exists() and text.exists()


def test_what_is_no_alibi_model_has_an_error_of_its_own(tiny: Path, text: Path) -> None:
    no_alibi(tiny, text)
    with pytest.raises(ConfigFieldError, match="no slopes"):
        reach(tiny, text)
    gpt2(tiny, text)
    with pytest.raises(UnknownFamilyError, match=r"model_type 'gpt2'.* is no ALiBi model"):
        reach(tiny, text)
    with pytest.raises(AlibiError, match=r"lengths=\[1, 5\]"):
        reach(SOURCE, lengths=[5, 1])


def test_the_command_line_shows_and_writes(tiny: Path, text: Path, tmp_path: Path) -> None:
    status, out, _ = run("reach", tiny, "--text", text, "--lengths", "64,128")
    assert status == 0 and "In 128 tokens a head attends" in " ".join(out.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt", "tiny"]
    status, out, _ = run("reach", tiny, "--text", text, "--lengths", "64", "--json", "--output", tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "reach.json").read_text())
    assert status == 0 and json.loads(out) == saved
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["reach.csv", "reach.html", "reach.json", "reach.png"]
    assert saved["command"].split()[0] == "alibi-hf"
    arguments = (
        "reach",
        tiny,
        "--text",
        text,
        "--lengths",
        "65",
        "--output",
        tmp_path / "out",
        "--overwrite",
        "--quiet",
    )
    assert run(*arguments)[:2] == (0, "")
    assert json.loads((tmp_path / "out" / "reach.json").read_text())["lengths"][0]["length"] == 65


def test_the_terminal_shows_every_slope(report: Reach) -> None:
    from rich.console import Console

    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(report))
    shown = console.export_text()
    for slope in {f"{head.slope:.4g}" for head in report.longest.heads}:
        assert f" {slope} " in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_json_and_csv_hold_every_figure(report: Reach, tmp_path: Path) -> None:
    path = report.save(tmp_path)
    saved = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(name))
    assert saved["schema_version"] == 1
    for entry, found in zip(saved["lengths"], report.lengths, strict=True):
        assert [HeadReach(**head) for head in entry["heads"]] == found.heads
        assert [BiasRounding(**each) for each in entry["rounding"]] == found.rounding
        assert (entry["saved"], entry["planned"]) == (found.saved, found.planned)
    with (tmp_path / "reach.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    heads = [(found.length, head) for found in report.lengths for head in found.heads]
    assert tuple(rows[0]) == COLUMNS and len(rows) == len(heads)
    for row, (length, head) in zip(rows, heads, strict=True):
        assert row == {"length": str(length), **{name: str(value) for name, value in vars(head).items()}}
    assert (tmp_path / "reach.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_needs_nothing_else_and_says_what_the_numbers_say(report: Reach) -> None:
    page_text = as_page(report)
    assert_needs_nothing_else(page_text)
    assert_can_be_read_by_anyone(re.sub("<g><title>.*?</title>", "<g>", page_text))  # those are names of squares
    page = Page(page_text)
    assert page.texts["h1"] == ["What the heads of sotu-mpt look at"]
    assert page.texts["li"][: len(findings(report))] == findings(report)
    cells, wanted = page.texts["td"], [cell for head in report.longest.heads for cell in head_cells(head)]
    start = cells.index("layer 0, head 0")
    assert cells[start : start + len(wanted)] == wanted and len(wanted) == 36 * len(HEADS)
    assert len(page.named("svg")) == 4 + 3 == len(page.texts["figcaption"])
    for head in report.longest.heads:
        assert f"layer {head.layer}, head {head.head}, slope {head.slope:.4g}: {head.window} tokens" in page_text


def test_the_same_reach_gives_the_same_bytes(report: Reach, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        dataclasses.replace(report).save(tmp_path / folder)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_everything_that_comes_from_outside_is_escaped(report: Reach) -> None:
    hostile = dataclasses.replace(
        report,
        path_or_id=HOSTILE,
        revision=HOSTILE,
        text=[{"name": HOSTILE, "bytes": 1, "sha256": HOSTILE, "characters": 1}],
        notes=[HOSTILE],
        command=HOSTILE,
        machine={HOSTILE: HOSTILE},
        versions={HOSTILE: HOSTILE},
    )
    page_text = as_page(hostile)
    assert_needs_nothing_else(page_text)
    assert unescape(page_text).count(HOSTILE) >= 8


def test_collapsed_heads_are_named_first_of_all(report: Reach) -> None:
    heads = [dataclasses.replace(head, collapsed=head.head == 2, late_first_token=0.7) for head in report.longest.heads]
    longest = dataclasses.replace(report.longest, heads=heads * 3)
    found = dataclasses.replace(report, lengths=[longest])
    line = next(line for line in findings(found) if "collapsed" in line)
    assert line.startswith("18 of 108 heads are collapsed onto the first token: layer 0, head 2; layer 1, head 2; ")
    assert line.endswith("; and 6 more.")
    assert as_page(found).count('<td class="failed">collapsed</td>') == 18


def test_without_matplotlib_there_are_heat_maps_and_it_is_said(
    report: Reach, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report.save(tmp_path)
    page_text = (tmp_path / "reach.html").read_text(encoding="utf-8")
    assert 'pip install "alibi-hf[plots]"' in unescape(page_text) and len(Page(page_text).named("svg")) == 4
    assert not (tmp_path / "reach.png").exists()


@pytest.mark.parametrize(("slope", "distance"), [(0.0, 0.25), (1e4, 0.0)])
def test_one_head_one_length_and_any_slope_are_drawn_too(slope: float, distance: float, tmp_path: Path) -> None:
    config = AlibiConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, alibi_slopes=[slope])
    found = measure_reach(AlibiForCausalLM(config), torch.zeros(2, dtype=torch.long), [2])
    assert found[0].heads[0].mean_distance == pytest.approx(distance) == found[0].heads[0].bias_distance
    assert found[0].heads[0].over_bias == pytest.approx(1)
    made = Reach("x", None, {}, "float32", "cpu", [], found)
    made.save(tmp_path)
    assert_needs_nothing_else((tmp_path / "reach.html").read_text(encoding="utf-8"))
    cells = Page((tmp_path / "reach.html").read_text(encoding="utf-8")).texts["td"]
    assert ("never" in cells) == (slope == 0.0)


def test_a_heat_map_of_many_heads_has_no_digits_and_one_name_each() -> None:
    values = [[float(row + column) for column in range(112)] for row in range(70)]
    names = [[f"<{row} {column}>" for column in range(112)] for row in range(70)]
    figure = heat_map("many", "caption", values, names, names, ("layer", "head"), (0.0, 180.0))
    assert figure.svg.count("<title>") == 7840 and "&lt;69 111&gt;" in figure.svg
    assert figure.svg.count("<text") < 60
    assert 'fill-opacity="0.040"' in figure.svg and 'fill-opacity="1.000"' in figure.svg


def test_tokens_are_those_of_the_whole_file(tiny: Path, text: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    part = tokenize(tokenizer, open_texts([text]), most=17)
    assert part.ids.tolist() == tokenizer(text.read_text(), add_special_tokens=False)["input_ids"][:17]
