"""`generate_long.py`: its figures on texts where they are known, and that they tell a broken model from a sound one."""

import csv
import math
import random
import re
import shutil
import zlib
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import generate_long
from alibi_hf import AlibiForCausalLM
from alibi_hf.model import positions_alibi
from judge import Judge, load
from metering import generate
from repetition import compression, distinct, earlier_runs, seen_before
from tests.examples.finetuning import write_checkpoint, write_text
from texts import load_texts

CHECKPOINTS = generate_long.CHECKPOINTS
BLOOM, MPT = str(CHECKPOINTS / "sotu-bloom"), str(CHECKPOINTS / "sotu-mpt")


def test_distinct_and_compression_of_known_texts() -> None:
    assert distinct("abcdef", 2) == 1
    assert distinct("aaaaaa", 2) == 1 / 5
    assert distinct("abab", 1) == 1 / 2
    with pytest.raises(ValueError, match="2 tokens have no 3-gram"):
        distinct("ab", 3)
    assert compression("the same. " * 100) == 1000 / len(zlib.compress(b"the same. " * 100, level=9)) > 20


def test_earlier_runs_of_known_texts() -> None:
    assert earlier_runs("") == []
    assert earlier_runs("abcdef") == [0] * 6
    assert earlier_runs("aaaa") == [0, 1, 2, 3]
    assert earlier_runs("abcXabcYbc") == [0, 0, 0, 0, 1, 2, 3, 0, 1, 2]
    assert seen_before([0, 1, 2, 3], 2) == 1 / 2


@pytest.mark.parametrize("letters", [1, 2, 3, 9])
def test_earlier_runs_are_those_found_by_looking(letters: int) -> None:
    """Slowly: the longest text before the end of each token that ends earlier too."""
    draw = random.Random(letters)
    for _ in range(20):
        text = "".join(draw.choices("abcdefghi"[:letters], k=40))
        truth = [
            max(length for length in range(stop) if text[stop - length : stop] in text[: stop - 1])
            for stop in range(1, len(text) + 1)
        ]
        assert earlier_runs(text) == truth


class Uniform(torch.nn.Module):
    """A judge that expects any of 64 tokens: 6 bits each."""

    def __init__(self) -> None:
        super().__init__()
        self.config = type("Config", (), {"max_position_embeddings": 8, "vocab_size": 64})
        self.device = torch.device("cpu")
        self.longest = 0

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> object:
        self.longest = max(self.longest, input_ids.shape[1])
        return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 64)})


class Characters:
    """A tokenizer of one token a character."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 64 for letter in text]}


def test_a_judge_that_knows_nothing_gives_six_bits_a_token() -> None:
    judge = Judge(Uniform(), Characters())
    first, second = judge.read(["ab" * 20, "äöü" * 3])
    assert first.perplexity == pytest.approx(64) and second.perplexity == pytest.approx(64)
    assert first.bits_per_byte == pytest.approx(6 * 39 / 40)  # its first token is not predicted
    assert second.bits_per_byte == pytest.approx(6 / 2)  # two bytes a letter
    assert judge.model.longest == 8  # its training length, never more
    with pytest.raises(ValueError, match="nothing to predict in ''"):
        judge.read(["abc", ""])
    with pytest.raises(ValueError, match="window of 1 tokens"):
        Judge(Uniform(), Characters(), 1)


def test_a_judge_with_a_table_of_positions_reads_no_farther() -> None:
    config = GPT2Config(n_positions=16, n_embd=8, n_layer=1, n_head=2, vocab_size=64)
    assert Judge(GPT2LMHeadModel(config), Characters()).window == 16
    with pytest.raises(ValueError, match="window of 17 tokens: transformer.wpe of the judge has 16 positions"):
        Judge(GPT2LMHeadModel(config), Characters(), 17)


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 40])
def test_the_judge_gives_every_token_half_a_window_of_context(tokens: int, tmp_path: Path) -> None:
    judge = Judge(*load(str(write_checkpoint(tmp_path / "judge"))))
    ids = torch.randint(4, 60, (tokens,))
    found = judge.losses(ids)
    assert judge.window == 16 and found.shape == (tokens,) and math.isnan(found[0])
    for at in range(1, tokens):
        start = 0 if at < 16 else min((at - 16) // 8 * 8 + 8, tokens - 16)  # of the window that predicts it
        assert at - start >= min(at, 8)
        with torch.no_grad():
            logits = judge.model(ids[None, start:at]).logits[0, -1].double()
        assert float(found[at]) == pytest.approx(float(-logits.log_softmax(-1)[ids[at]]), abs=2e-5), at


def run(source: Path, output: Path, *arguments: str) -> int:
    names = ["--model", str(source / "checkpoint"), "--judge", str(source / "checkpoint"), "--prompt", "the cat"]
    names += ["--text", str(source / "text"), "--output_dir", str(output), "--tokens", "48", "--segment", "16"]
    return generate_long.main([*names, "--continuations", "2", *arguments])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    write_checkpoint(folder / "checkpoint")
    write_text(folder / "text", 60)
    return folder


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_what_it_writes(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(source, tmp_path / "out", "--upstream", "True") == 0
    said = capsys.readouterr().out
    assert "BloomForCausalLM" in said and "fails" not in said
    quality = read_csv(tmp_path / "out" / "quality.csv")
    places = [(str(start), str(start + 16)) for start in (0, 16, 32)]
    assert [(row["text"], row["row"], (row["start"], row["stop"])) for row in quality] == [
        (kind, row, place) for kind in ("written", "real") for row in "01" for place in places
    ]
    assert all(math.isfinite(float(row[name])) for row in quality for name in generate_long.QUALITY)
    cost = read_csv(tmp_path / "out" / "cost.csv")
    config = AlibiForCausalLM.from_pretrained(source / "checkpoint").config
    one = 2 * 2 * config.num_hidden_layers * config.hidden_size * 4  # keys and values of two texts, a token
    assert [row["class"] for row in cost] == ["AlibiForCausalLM"] * 3 + ["BloomForCausalLM"] * 3
    for row in cost:
        read = int(row["stop"]) - 1  # the last token of all has not been read yet
        assert float(row["seconds"]) > 0 and int(row["cache_bytes"]) >= read * one
    assert int(cost[5]["cache_bytes"]) == 47 * one  # Transformers' own cache has no room to spare
    assert (tmp_path / "out" / "generate_long.png").stat().st_size > 10_000
    texts = [(tmp_path / "out" / f"text-{row}.txt").read_text(encoding="utf-8") for row in (0, 1)]
    assert texts[0] != texts[1] and all(text.replace(" ", "").startswith("thecat") for text in texts)

    assert run(source, tmp_path / "again") == 0
    assert (tmp_path / "again" / "quality.csv").read_text() == (tmp_path / "out" / "quality.csv").read_text()
    assert run(source, tmp_path / "other", "--seed", "1") == 0
    assert (tmp_path / "other" / "text-0.txt").read_text(encoding="utf-8") != texts[0]


@pytest.fixture(scope="module")
def real() -> list[int]:
    """Tokens of held-out text."""
    return AutoTokenizer.from_pretrained(BLOOM)("\n\n".join(load_texts().held_out)[:50_000], verbose=False)["input_ids"]


def test_lengths_in_the_models_own_settings_do_not_count(source: Path) -> None:
    model, tokenizer = load(str(source / "checkpoint"))
    model.generation_config.update(max_new_tokens=3, num_beams=2)
    prompt = tokenizer(["the cat"] * 2, return_tensors="pt", return_token_type_ids=False)
    found = generate(model, prompt, tokens=32, segment=16, do_sample=True)
    assert found.tokens is not None and found.tokens.shape == (2, 32) and len(found.costs) == 2


def test_loops_are_found_in_the_segment_they_are_in(real: list[int]) -> None:
    tokenizer, ids = AutoTokenizer.from_pretrained(BLOOM), real
    row = torch.tensor(ids[:256] + ids[256:272] * 16 + ids[300:556])
    (figures,) = generate_long.quality(row[None], tokenizer, Judge(*load(MPT)), 256)
    assert figures[1]["distinct"] == 16 / 253 and figures[1]["longest_run"] == 240
    assert figures[1]["seen_before"] == pytest.approx(240 / 256, abs=0.02)
    assert figures[1]["compression"] > 5 * figures[0]["compression"]
    for other in (figures[0], figures[2]):
        assert other["distinct"] > 0.95 and other["longest_run"] < 20


def slopes_past_the_length(change: float):
    """What gives the slopes of a call, multiplied by `change` where it has more than 256 keys."""
    right = positions_alibi.scaled_slopes

    def wrong(config, key_length, *args):
        return right(config, key_length, *args) * (change if int(key_length) > 256 else 1.0)

    return wrong


def judged(wrong: float, real: list[int], monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Figures of 64 tokens that follow on 256 of real text, with the slopes multiplied by `wrong` all along them."""
    model, tokenizer = load(BLOOM)
    model.config.attention_window = False  # its proof is for slopes that are not negative
    rows = torch.tensor([real[start : start + 256] for start in (0, 2000, 4000, 6000)])
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(positions_alibi, "scaled_slopes", slopes_past_the_length(wrong))
        written = model.generate(rows, min_length=320, max_length=320, do_sample=True, top_p=0.9, top_k=0)
    texts = generate_long.quality(written, tokenizer, Judge(*load(MPT)), 64)
    return {name: generate_long.mean_and_spread(texts, 4, name)[0] for name in generate_long.QUALITY}


@pytest.mark.slow
def test_quality_holds_past_the_training_length_and_not_with_a_wrong_bias(
    real: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = judged(1.0, real, monkeypatch)
    assert sound["perplexity"] < 60 and sound["bits_per_byte"] < 1.6 and sound["distinct"] > 0.95
    for wrong in (0.0, -1.0):
        broken = judged(wrong, real, monkeypatch)
        assert broken["bits_per_byte"] > 1.3 * sound["bits_per_byte"], wrong


def test_upstreams_mpt_fails_past_its_length_and_ours_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "text.txt").write_text(load_texts().held_out[0], encoding="utf-8")
    names = ["--model", MPT, "--judge", BLOOM, "--tokens", "320", "--segment", "64", "--continuations", "1"]
    names += ["--text", str(tmp_path / "text.txt")]
    assert generate_long.main([*names, "--upstream", "True", "--output_dir", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert re.search(r"MptForCausalLM fails after 2\d\d tokens: ", said) and "fails" in said.split("cost:")[1]
    cost = read_csv(tmp_path / "out" / "cost.csv")
    assert [row["class"] for row in cost] == ["AlibiForCausalLM"] * 5 + ["MptForCausalLM"] * 4


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--tokens", "40"], "--tokens 40 is no multiple of --segment 16"),
        (["--tokens", "0"], "--tokens 0 is no multiple"),
        (["--segment", "7"], "--segment 7 is too short"),
        (["--continuations", "0"], "--continuations 0"),
        (["--top_p", "0"], "--top_p 0.0"),
        (["--temperature", "nan"], "--temperature nan"),
        (["--prompt", ""], "--prompt has 0 tokens"),
        (["--prompt", "the cat sat " * 9], "--prompt has .* fewer than --segment 16"),
        (["--judge", "no/such/judge"], "no/such/judge"),
        (["--judge_window", "1"], "window of 1 tokens"),
        (["--judge_window", "0"], "window of 0 tokens"),
        (["--seed", "-1"], "--seed -1 must be at least 0"),
        (["--model", "no/such/model"], "no/such/model"),
        (["--text", "no/such/text"], "no/such/text"),
        (["--tokens", "16000"], "tokens of --text are held out, fewer than --tokens 16000"),
        (["--output_dir", f"{__file__}/out"], "exists|Not a directory"),
        (["--device", "abacus"], "abacus"),
    ],
    ids=lambda value: " ".join(value)[:24] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], says: str
) -> None:
    assert run(source, tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("generate_long.py: ") and re.search(says, error), error
    assert not (tmp_path / "out").exists()


def test_a_model_that_fails_on_the_way_ends_with_its_reason(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(source / "checkpoint", tmp_path / "checkpoint")
    model = AlibiForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    model.save_pretrained(tmp_path / "checkpoint")
    assert run(source, tmp_path / "out", "--model", str(tmp_path / "checkpoint")) == 1
    assert "AlibiForCausalLM fails after" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())
