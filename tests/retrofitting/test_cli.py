"""`alibi-hf retrofit`."""

import json

import pytest

from tests.retrofitting.sources import SOURCES
from tests.test_cli import run


@pytest.mark.parametrize("layout", SOURCES)
def test_it_says_plainly_what_was_made(layout, tmp_path):
    source = SOURCES[layout](tmp_path / "source")
    status, out, _ = run("retrofit", source, tmp_path / "out", "--bias-max", "16", "--length", "96")
    assert status == 0
    words = " ".join(out.replace("│", " ").split())
    for said in ("computes something else than its source", "trained on", "arrived", "alibi_bias_max 16"):
        assert said in words
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["alibi_bias_max"], config["max_position_embeddings"]) == (16, 96)


def test_json_and_quiet(tmp_path):
    source = SOURCES["gpt2"](tmp_path / "source")
    status, out, _ = run("retrofit", source, tmp_path / "out", "--json", "--no-check")
    assert status == 0
    assert json.loads(out) == json.loads((tmp_path / "out" / "retrofit.json").read_text())
    assert run("retrofit", source, tmp_path / "out", "--overwrite", "--quiet")[:2] == (0, "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["retrofit", "examples/checkpoints/sotu-bloom", "OUT"], "has ALiBi already"),
        (["retrofit", "SOURCE", "OUT", "--bias-max", "0"], "alibi_bias_max"),
        (["retrofit", "SOURCE", "SOURCE"], "would replace the source"),
        (["retrofit", "/nowhere/at/all", "OUT"], "not a folder"),
        (["convert", "SOURCE", "OUT"], "alibi-hf retrofit"),
    ],
)
def test_bad_input_exits_2_with_one_line(arguments, words, tmp_path):
    places = {"OUT": tmp_path / "out", "SOURCE": SOURCES["gpt2"](tmp_path / "source")}
    status, out, err = run(*[places.get(argument, argument) for argument in arguments])
    assert status == 2
    assert words in err and "\n" not in err.strip()
    assert "Traceback" not in out + err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
