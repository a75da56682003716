"""Runs of `evaluate` as a whole: killed and continued, refused, and on the command line."""

import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from alibi_hf import AlibiError, AlibiForCausalLM, Evaluation, evaluate
from alibi_hf.cli import app
from alibi_hf.evaluation import jobs
from alibi_hf.evaluation.loading import Options, Subject, _check_pinned
from tests import builders

TEXT = "We the people of the United States, in order to form a more perfect union, establish justice. " * 4
LENGTHS = [16, 50, 100]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return builders.tokenizer(builders.bloom(tmp_path_factory.mktemp("runs") / "bloom"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def figures(found: Evaluation) -> list[Any]:
    """All numbers but how long it took and what memory."""
    return [
        [replace(each, seconds=0, peak_bytes=None) for each in model.readings] + [model.notes] for model in found.models
    ]


def kill_after(readings: int, *args: Any, **options: Any) -> None:
    """Evaluate in a forked process that is killed in the middle of the reading after so many."""
    seen: list[str] = []

    def progress(what: str, done: int, total: int) -> None:
        if done and total and ", " in what:
            if what not in seen:
                seen.append(what)
            if len(seen) > readings:
                os.kill(os.getpid(), signal.SIGKILL)

    if (child := os.fork()) == 0:
        try:
            evaluate(*args, progress=progress, **options)
        finally:
            os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("finished", [0, 1, 7])
def test_a_killed_run_goes_on_with_the_same_numbers(
    model: Path, text: Path, tmp_path: Path, finished: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [model, f"upstream:{model}"]
    straight = evaluate(models, text, LENGTHS)
    out = tmp_path / "out"
    kill_after(finished, models, text, LENGTHS, output=out)
    assert not out.exists()
    kept = json.loads((tmp_path / ".out.partial" / ".resume.json").read_text())["finished"]
    assert len(kept) == finished
    read, done = jobs.read, []
    monkeypatch.setattr(jobs, "read", lambda *args: done.append(args[2:4]) or read(*args))
    found = evaluate(models, text, LENGTHS, output=out, resume=True)
    assert len(done) == 12 - finished  # nothing is read twice
    assert figures(found) == figures(straight)
    for number, each in enumerate(kept):  # finished readings as they were, times and all
        assert [r for m in found.models for r in m.readings][number].seconds == each["reading"]["seconds"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.txt"]
    assert not (out / ".resume.json").exists()


def test_another_run_is_not_continued(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    kill_after(1, model, text, LENGTHS, output=out)
    journal = (tmp_path / ".out.partial" / ".resume.json").read_bytes()
    with pytest.raises(AlibiError, match="left from a run that was cut off; use --resume"):
        evaluate(model, text, LENGTHS, output=out)
    for changes, says in (
        ({"lengths": [16, 50]}, "lengths is not as in the run that was cut off"),
        ({"stride": 3}, "stride is not as"),
        ({"max_tokens": 300}, "max_tokens is not as"),
        ({"dtype": "float64"}, "dtype is not as"),
        ({"names": ["other"]}, "models is not as"),
    ):
        with pytest.raises(AlibiError, match=says):
            evaluate(model, text, **{"lengths": LENGTHS, "output": out, "resume": True, **changes})
    text.write_text(TEXT + "!")
    with pytest.raises(AlibiError, match="text is not as in the run"):
        evaluate(model, text, LENGTHS, output=out, resume=True)
    text.write_text(TEXT)
    config = model / "config.json"
    status = config.stat()
    os.utime(config, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    with pytest.raises(AlibiError, match=r"the source's .*config.json is not as in the run"):
        evaluate(model, text, LENGTHS, output=out, resume=True)
    os.utime(config, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (tmp_path / ".out.partial" / ".resume.json").read_bytes() == journal
    evaluate(model, text, LENGTHS, output=out, resume=True)
    evaluate(model, text, [16], output=out, overwrite=True)
    assert json.loads((out / "evaluation.json").read_text())["lengths"] == [16]


def test_readings_outlive_an_error_while_their_files_are_written(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(Evaluation, "save", full)
        with pytest.raises(OSError, match="No space left"):
            evaluate(model, text, LENGTHS, output=out)
    assert not out.exists()
    monkeypatch.setattr(jobs, "read", None)  # all is read already
    found = evaluate(model, text, LENGTHS, output=out, resume=True)
    assert len(found.models[0].readings) == 6 and (out / "evaluation.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.txt"]


def test_the_output_replaces_nothing_that_is_read(model: Path, text: Path, tmp_path: Path) -> None:
    books, words = tmp_path / "books", builders.tokenizer(tmp_path / "words")
    books.mkdir()
    book = text.rename(books / "book.txt")
    for given, out in ((book, books), (books, books), (book, words), (book, model), (book, tmp_path)):
        with pytest.raises(AlibiError, match=f"writing to {out} would replace the source"):
            evaluate(model, given, LENGTHS, output=out, tokenizer=words, overwrite=True)
    assert book.read_text() == TEXT and (words / "tokenizer.json").exists()


def test_a_tokenizer_that_has_changed_is_not_gone_on_with(model: Path, text: Path, tmp_path: Path) -> None:
    words = builders.tokenizer(tmp_path / "words")
    kill_after(1, model, text, LENGTHS, output=tmp_path / "out", tokenizer=words)
    os.utime(words / "tokenizer.json", ns=(1, 1))
    with pytest.raises(AlibiError, match=r"words/tokenizer.json is not as in the run"):
        evaluate(model, text, LENGTHS, output=tmp_path / "out", tokenizer=words, resume=True)


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments)], catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


def test_the_command_line(model: Path, text: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    AlibiForCausalLM.from_pretrained(model).save_pretrained(own)
    builders.tokenizer(own)
    out = tmp_path / "out"
    arguments = (model, own, "--name", "first", "--name", "second", "--text", text, "--lengths", "16,50")
    status, shown, _ = run(*arguments, "--output", out, "--json")
    assert status == 0
    assert json.loads(shown) == json.loads((out / "evaluation.json").read_text())
    assert [each["name"] for each in json.loads(shown)["models"]] == ["first", "second"]
    assert run(*arguments, "--output", out, "--overwrite", "--quiet") == (0, "", "")
    status, _, said = run(*arguments, "--output", out)
    assert status == 2 and "exists and is not empty; --overwrite" in said
    status, shown, _ = run(model, "--text", text, "--lengths", "16")
    assert status == 0 and "bloom" in shown


def bad(folder: Path, model: Path) -> dict[str, tuple[list[object], str]]:
    """What is wrong, by name: arguments, and what has to be said."""
    text = folder / "text.txt"
    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes("Größe".encode("latin-1"))
    bare = folder / "bare"
    bare.mkdir()
    builders.bloom(folder / "no-tokenizer")
    builders.tokenizer(builders.bloom(folder / "small"))
    raw = json.loads((folder / "small" / "config.json").read_text())
    narrow = builders.bloom(folder / "narrow", raw={"vocab_size": 50})
    builders.tokenizer(narrow)
    odd = builders.tokenizer(builders.bloom(folder / "odd"))
    (odd / "config.json").write_text(json.dumps({**raw, "model_type": "t5", "architectures": ["T5Model"]}))
    rotary = builders.tokenizer(builders.falcon(folder / "rotary", raw={"alibi": False}))
    code = builders.tokenizer(builders.bloom(folder / "code"))
    remote = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (code / "config.json").write_text(json.dumps(remote))
    (code / "mine.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    ok = ["--text", text, "--lengths", "16"]
    return {
        "text shorter than every length": (
            [model, "--text", text, "--lengths", "1000"],
            "fewer than one window of 1000",
        ),
        "empty file": ([model, "--text", folder / "empty.txt"], "empty.txt is empty"),
        "wrong encoding": ([model, "--text", folder / "latin.txt"], "not UTF-8 text: byte 0xf6 near byte 2"),
        "no file": ([model, "--text", folder / "none.txt"], "No such file"),
        "a folder without text": ([model, "--text", bare], "no file that ends in .txt"),
        "a second file without --text": ([model, text, "--text", text], "is a file, not a model"),
        "no model": ([bare, *ok], "config.json"),
        "no folder": ([folder / "none" / "such", *ok], "none/such"),
        "no tokenizer": ([folder / "no-tokenizer", *ok], "has no tokenizer"),
        "a tokenizer of another": ([narrow, *ok], "but the model has 50 embeddings"),
        "one model twice": ([model, model, *ok], "two models are called"),
        "too few names": ([model, f"upstream:{model}", "--name", "a", *ok], "1 names are given for 2 models"),
        "two of one name": (
            [model, f"upstream:{model}", "--name", "a", "--name", "a", *ok],
            "two models are called 'a'",
        ),
        "a length of one": ([model, "--text", text, "--lengths", "1,16"], "no list of lengths above 1"),
        "a stride too long": ([model, *ok, "--stride", "16"], "a stride of 16 does not fit windows of 16"),
        "too few tokens": ([model, *ok, "--max-tokens", "15"], "max_tokens=15 is less than the shortest length, 16"),
        "no such dtype": ([model, *ok, "--dtype", "int3"], "dtype='int3' is not one of"),
        "no such device": ([model, *ok, "--device", "abacus"], "device='abacus' cannot be used"),
        "a device without numbers": ([model, *ok, "--device", "meta"], "device='meta' cannot be used"),
        "a family's other positions": ([rotary, *ok], f"upstream:{rotary} runs Transformers' own class"),
        "not a causal model": ([odd, *ok], "T5Config, of which Transformers has no causal language model"),
        "code of its own": ([code, *ok], "is not run unless --trust-remote-code"),
        "resume without output": ([model, *ok, "--resume"], "give the output"),
    }


def test_a_gpu_that_is_not_there_is_said(model: Path, text: Path) -> None:
    with pytest.raises(AlibiError, match="device='cuda:99' cannot be used"):
        evaluate(model, text, LENGTHS, device="cuda:99")


def test_bad_input_is_one_line_and_leaves_nothing(model: Path, text: Path, tmp_path: Path) -> None:
    for what, (arguments, says) in bad(tmp_path, model).items():
        output = [] if "--resume" in arguments else ["--output", tmp_path / "out"]
        status, shown, said = run(*arguments, *output)
        assert status == 2 and not shown, what
        assert says in said and said.strip().count("\n") == 0, (what, said)
        assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".out*")), what
    assert not (tmp_path / "ran").exists()


def test_code_of_a_folder_runs_when_that_is_asked_for(model: Path, text: Path, tmp_path: Path) -> None:
    folder = builders.tokenizer(tmp_path / "code")
    AlibiForCausalLM.from_pretrained(model).save_pretrained(folder)
    for path in folder.glob("*_alibi.py"):
        path.write_text(path.read_text().replace('model_type = "alibi"', 'model_type = "mine"'))
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "model_type": "mine"}))
    found = evaluate(folder, text, [50], trust_remote_code=True).models[0]
    assert found.readings[0].loss == pytest.approx(evaluate(model, text, [50]).models[0].readings[0].loss, rel=1e-6)
    from_hub = Subject("mine", "owner/mine", folder, "0" * 40, upstream=True, raw=raw)
    for revision in (None, "main", "0" * 39):
        with pytest.raises(AlibiError, match="only at a commit: give its 40 digits"):
            _check_pinned(from_hub, ["modeling.Mine"], Options(revision=revision, trust_remote_code=True))
    elsewhere = {name: f"other/code--{code}" for name, code in raw["auto_map"].items()}
    (folder / "config.json").write_text(json.dumps({**raw, "model_type": "mine", "auto_map": elsewhere}))
    with pytest.raises(AlibiError, match="runs code of another repository"):
        evaluate(folder, text, [50], trust_remote_code=True)


def test_a_model_whose_weights_are_broken_does_not_stop_the_others(model: Path, text: Path, tmp_path: Path) -> None:
    broken = builders.tokenizer(builders.bloom(tmp_path / "broken"))
    file = broken / "model.safetensors"
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "n_layer": 3}))
    found = evaluate([f"upstream:{broken}", model], text, LENGTHS).models
    assert "lacks 12 tensors" in found[0].failure and not found[0].readings
    assert all(each.loss for each in found[1].readings)
    (broken / "config.json").write_text(json.dumps({**config, "hidden_size": 96}))
    found = evaluate([f"upstream:{broken}", model], text, LENGTHS).models
    assert re.search(r"tensors of another shape .*: \[\d+.* is stored, \[\d*96.* needed", found[0].failure)
    (broken / "config.json").write_text(json.dumps({**config, "n_layer": 3}))
    with pytest.raises(AlibiError, match="no model could be loaded: broken .upstream.*lacks 12 tensors"):
        evaluate(f"upstream:{broken}", text, LENGTHS, output=tmp_path / "out")
    assert file.exists() and not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()
