"""`push`: what goes, what is refused before anything leaves, and what the Hub makes of it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import alibi_hf
from alibi_hf import AlibiError, CheckpointFileError, ConfigFieldError, HubError, NotProvedError, SecretError
from alibi_hf.checkpoints.own_config import read_own_config
from alibi_hf.cli import app
from alibi_hf.hub.preflight import _lengths, preflight
from alibi_hf.hub.running import compute
from alibi_hf.hub.upload import Target
from alibi_hf.model.bias_alibi import Distances
from tests.builders import mpt, tokenizer
from tests.hub.server import READ_TOKEN, WRITE_TOKEN
from tests.scratch import scratch_folder

LENGTH = 64
COMPARED = ["output 0", "padded", "packed", "decoded", "long", "eager"]
TOKEN = "hf_" + "AbCdEfGhIj" * 4
CODE = {path.name for path in Path(alibi_hf.__file__).parent.joinpath("model").glob("*_alibi.py")}
WEIGHTS = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"}
MODEL = {"config.json", "generation_config.json", *WEIGHTS, *CODE}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
REPORTS = {"conversion.json", "verification.json", "verification.md", "verification.html"}


@pytest.fixture(scope="module")
def converted() -> Path:
    """Return a proved folder of two shards with tokenizer and licence; not to be changed."""
    source = tokenizer(mpt(scratch_folder() / "source", layers=1, length=LENGTH))
    (source / "LICENSE").write_text("Do as you like.")
    out = scratch_folder() / "out"
    assert alibi_hf.convert(source, out, max_shard_size=100_000, command="test").verified
    return out


@pytest.fixture
def folder(converted: Path, tmp_path: Path) -> Path:
    """Return a copy that may be changed."""
    return Path(shutil.copytree(converted, tmp_path / "out"))


@pytest.fixture
def no_preflight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the preflight out, which takes a process of its own."""
    monkeypatch.setattr("alibi_hf.hub.push.preflight", lambda *args: [])


def edit(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file; None takes one out."""
    held = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in held.items() if value is not None}))


def dry(folder: Path, **options: Any) -> alibi_hf.Push:
    return alibi_hf.push(folder, "tester/m", dry_run=True, **options)


def test_a_dry_run_lists_what_goes_and_what_stays(folder: Path) -> None:
    for name in ("optimizer.pt", "training_args.bin", ".env", "notes.txt", "other.safetensors", "push.json"):
        (folder / name).write_text("x")
    for name in (".git", "checkpoint-10", "additional_chat_templates"):
        (folder / name).mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    (folder / "LICENSE.more").symlink_to("/etc/hostname")
    (folder / "curve.png").write_bytes(b"png")
    report = dry(folder)  # HF_HUB_OFFLINE is set in the tests: whoever asked the Hub would fail
    sizes = {entry.name: entry.bytes for entry in report.files}
    assert set(sizes) == MODEL | TOKENIZER | REPORTS | {
        "README.md",
        "LICENSE",
        "curve.png",
        "additional_chat_templates/tools.jinja",
    }
    assert all(bytes_ == (folder / name).stat().st_size for name, bytes_ in sizes.items())
    assert report.bytes == sum(sizes.values())
    left = {entry.name: entry.reason for entry in report.left_out}
    assert left.keys() == {
        "optimizer.pt",
        "training_args.bin",
        ".env",
        "notes.txt",
        "other.safetensors",
        "push.json",
        ".git",
        "checkpoint-10",
        "LICENSE.more",
    }
    assert "pickle" in left["optimizer.pt"] and "link" in left["LICENSE.more"] and left[".env"] == "hidden"
    assert (report.verdict, report.uploaded) == ("proved", None)
    assert [entry.name for entry in report.preflight] == COMPARED
    assert not any(entry.name.endswith(".partial") for entry in folder.iterdir())


@pytest.mark.slow
def test_edited_code_is_found_by_running_it(folder: Path) -> None:
    code = folder / "single_alibi.py"
    right = "torch.add(bias, scores"
    assert right in code.read_text()
    code.write_text(code.read_text().replace(right, "torch.add(2 * bias, scores"))  # one query against a cache
    with pytest.raises(NotProvedError, match=r"what this package computes \(decoded: off by up to"):
        dry(folder, unverified=True)


def test_a_folder_that_fails_to_load_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fails.py").write_text("raise ImportError('no module named x')")
    monkeypatch.setattr("alibi_hf.hub.running.__file__", str(tmp_path / "fails.py"))
    with pytest.raises(CheckpointFileError, match="does not load by its own code.*ImportError: no module named x"):
        dry(folder)


WRONG: dict[str, Callable[..., torch.Tensor]] = {
    "zero": lambda bias, delta: 0 * bias,
    "sign": lambda bias, delta: -bias,
    "past the training length": lambda bias, delta: bias * (1 + 1e-6 * (delta > LENGTH)[:, None]),
    "between documents": lambda bias, delta: bias + (delta == LENGTH // 2)[:, None],
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_bias_is_seen(converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    lengths = _lengths(read_own_config(converted))
    right = compute(alibi_hf.AlibiForCausalLM.from_pretrained(converted), *lengths)
    monkeypatch.setattr("alibi_hf.hub.preflight._run_alone", lambda *args: right)
    assert [entry.name for entry in preflight(converted, "AlibiForCausalLM", tmp_path)] == COMPARED
    whole = Distances.bias
    monkeypatch.setattr(Distances, "bias", lambda self, delta, *args: WRONG[wrong](whole(self, delta, *args), delta))
    with pytest.raises(NotProvedError, match="off by up to"):
        preflight(converted, "AlibiForCausalLM", tmp_path)


def test_edited_weights_config_and_code_are_not_proved(folder: Path, no_preflight: None) -> None:
    assert dry(folder).verdict == "proved"
    shard = folder / "model-00001-of-00002.safetensors"
    whole, config = shard.read_bytes(), (folder / "config.json").read_text()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(NotProvedError, match="model-00001-of-00002.safetensors changed.*SHA-256.*--unverified"):
        dry(folder)
    assert "changed" in dry(folder, unverified=True).verdict
    shard.write_bytes(whole)
    for change, said in (
        ({"alibi_bias_max": 9.0}, "alibi_bias_max is 9.0, not 8"),
        ({"alibi_slopes": [0.1] * 6}, r"alibi_slopes is \[0.1, .*not None"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16', the weights are stored in 'float32'"),
    ):
        edit(folder / "config.json", **change)
        with pytest.raises(NotProvedError, match=said):
            dry(folder)
        (folder / "config.json").write_text(config)
    # No logit depends on these; and a label is no path.
    edit(folder / "config.json", eos_token_id=5, id2label={"0": "/r/finland", "1": "other"})
    assert dry(folder).verdict == "proved"
    with (folder / "bias_alibi.py").open("a") as file:
        file.write("# mine\n")
    with pytest.raises(NotProvedError, match="bias_alibi.py differ from this package's code"):
        dry(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "verification.json").unlink(), "holds no verification.json"),
        (lambda folder: edit(folder / "verification.json", verdict="not proved"), "says 'not proved'"),
        (lambda folder: (folder / "conversion.json").unlink(), "holds no conversion.json"),
        (lambda folder: edit(folder / "conversion.json", output={"files": []}), "the weights are model-00001"),
        (lambda folder: edit(folder / "conversion.json", output=None), "lists no weight files"),
        (lambda folder: edit(folder / "conversion.json", config=None), "does not hold the config"),
    ],
)
def test_what_is_not_proved_needs_unverified(
    folder: Path, no_preflight: None, change: Callable[[Path], None], said: str
) -> None:
    change(folder)
    with pytest.raises(NotProvedError, match=said):
        dry(folder)
    assert said in dry(folder, unverified=True).verdict


def link_out(path: Path) -> None:
    """Put a link to a copy elsewhere in the place of a file."""
    path.rename(path.parent.parent / path.name)
    path.symlink_to(path.parent.parent / path.name)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda f: edit(f / "config.json", model_type="bloom"), CheckpointFileError, "model_type='bloom'.*convert"),
        (lambda f: edit(f / "config.json", architectures=["BloomModel"]), ConfigFieldError, "architectures="),
        (lambda f: edit(f / "config.json", auto_map=None), ConfigFieldError, "AutoConfig is None"),
        (lambda f: edit(f / "config.json", auto_map={"AutoConfig": "a/b--c.D"}), ConfigFieldError, "a/b--c.D"),
        (lambda f: edit(f / "config.json", _name_or_path="/home/me/my model"), ConfigFieldError, "of this machine"),
        (lambda f: (f / "config.json").unlink(), CheckpointFileError, "config.json does not exist"),
        (lambda f: (f / "bias_alibi.py").unlink(), CheckpointFileError, "code file bias_alibi.py"),
        (lambda f: (f / "modeling_alibi.py").unlink(), CheckpointFileError, "code file modeling_alibi.py"),
        (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), CheckpointFileError, "missing"),
        (lambda f: link_out(f / "model-00002-of-00002.safetensors"), CheckpointFileError, "link out of the folder"),
        (lambda f: link_out(f / "config.json"), CheckpointFileError, "link out of the folder"),
        (lambda f: shutil.rmtree(f), CheckpointFileError, "is no folder"),
    ],
)
def test_a_folder_that_would_not_load_is_refused(
    folder: Path, no_preflight: None, change: Callable[[Path], None], error: type[AlibiError], said: str
) -> None:
    change(folder)
    with pytest.raises(error, match=said):
        dry(folder, unverified=True)


@pytest.mark.parametrize("name", ["README.md", "tokenizer_config.json", "layers_alibi.py", "LICENSE"])
def test_tokens_are_not_published(folder: Path, no_preflight: None, name: str) -> None:
    before = (folder / name).read_text()
    for token in (TOKEN, "api_org_" + TOKEN[3:]):
        (folder / name).write_text(f"{before}\n# {token}\n")
        with pytest.raises(SecretError, match=f"{name} holds what looks like") as caught:
            dry(folder, unverified=True)
        assert token not in str(caught.value)


def test_a_token_that_a_writer_noted_in_the_weights_is_not_published(folder: Path, no_preflight: None) -> None:
    shard = folder / "model-00001-of-00002.safetensors"
    save_file(load_file(shard), shard, metadata={"format": "pt", "command": f"train --token {TOKEN}"})
    with pytest.raises(SecretError, match="model-00001-of-00002.safetensors holds what looks like"):
        dry(folder, unverified=True)


@pytest.mark.parametrize("metadata", ["license: [", "model-index: 3", "- license"])
def test_a_card_that_the_hub_cannot_read_is_refused_before_the_model_goes(
    folder: Path, no_preflight: None, metadata: str
) -> None:
    (folder / "README.md").write_text(f"---\n{metadata}\n---\n# Mine\n")
    with pytest.raises(CheckpointFileError, match=r"metadata of .*README.md cannot be read.*Nothing was uploaded"):
        dry(folder)


def test_the_token_in_use_is_not_published(folder: Path, no_preflight: None) -> None:
    (folder / "README.md").write_text("made by my-own-token")
    with pytest.raises(SecretError, match="line 1"):
        dry(folder, token="my-own-token")
    (folder / "optimizer.pt").write_text(TOKEN)  # stays anyway
    assert dry(folder).verdict == "proved"


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ({"repo_id": "alone"}, "USER/NAME"),
        ({"repo_id": "a/b/c"}, "no Hub id"),
        ({"repo_id": "a/-b"}, "no Hub id"),
        ({"repo_id": "a/b", "revision": "x", "create_pr": True}, "refs/pr/N"),
        ({"repo_id": "a/b", "revision": "0" * 40}, "is a commit"),
    ],
)
def test_a_target_that_is_none_is_refused(target: dict[str, Any], said: str) -> None:
    with pytest.raises(HubError, match=said):
        Target(**target)
    assert TOKEN not in repr(Target("a/b", token=TOKEN))


def test_the_command_line(folder: Path, no_preflight: None) -> None:
    def run(*options: str) -> Any:
        return CliRunner().invoke(app, ["push", str(folder), "tester/m", *options])

    report = json.loads(run("--dry-run", "--json").stdout)
    assert (report["schema_version"], report["verdict"], report["dry_run"]) == (1, "proved", True)
    assert {"name": "LICENSE", "bytes": 15} in report["files"] and report["uploaded"] is None
    shown = run("--dry-run")
    assert shown.exit_code == 0 and "nobody was asked" in shown.stdout
    assert run("--dry-run", "--quiet").stdout == "" and not (folder / "push.json").exists()
    offline = run()
    assert offline.exit_code == 2 and "HF_HUB_OFFLINE is set" in offline.stderr
    (folder / "verification.json").unlink()
    refused = run("--dry-run")
    assert refused.exit_code == 1 and "not proved:" in refused.stderr and "--unverified" in refused.stderr
    assert run("--dry-run", "--unverified").exit_code == 0
    (folder / "config.json").unlink()
    assert run("--dry-run", "--unverified").exit_code == 2


@pytest.fixture(scope="module")
def pushed(converted: Path) -> dict[str, Any]:
    """Return what the pushes of `pushing.py` found."""
    output, folder = scratch_folder(), scratch_folder() / "out"
    shutil.copytree(converted, folder)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.hub.pushing", str(folder), str(output)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    shown = done.stdout + done.stderr + (output / "found.json").read_text() + (output / "push.json").read_text()
    shown += "".join(path.read_text(errors="replace") for path in folder.iterdir() if path.is_file())
    assert WRITE_TOKEN not in shown and READ_TOKEN not in shown
    return json.loads((output / "found.json").read_text())


@pytest.mark.slow
def test_model_first_then_the_card_that_names_the_commit(pushed: dict[str, Any]) -> None:
    plain = pushed["plain"]
    _, first, second, other = plain["commits"]
    assert plain["pushed"] == [first, second] and first in plain["card"]
    assert plain["private"] and plain["same"]
    assert set(plain["files"]) == MODEL | TOKENIZER | REPORTS | {"README.md", "LICENSE", ".gitattributes", "notes.txt"}
    assert plain["preflight"] == COMPARED
    assert len(plain["puts"][0]) == 2
    assert plain["again"] == [first, second] and plain["puts"][1] == []  # nothing new: no commit, no weights
    assert plain["other"] == [first, other]  # someone else's commit on top stays the last


@pytest.mark.slow
def test_pull_request_and_branch(pushed: dict[str, Any]) -> None:
    request, branch = pushed["pull_request"], pushed["branch"]
    assert request["revisions"] == ["refs/pr/1", "refs/pr/1"]
    assert request["main"] and request["commits"] and request["again"]
    assert request["deleted"] == [
        "adapter_config.json",
        "model-00001-of-00009.safetensors",
        "old_alibi.py",
        "retrofit.json",
    ]
    assert request["left"] == [".gitattributes", "a/model.safetensors", "evaluation.json"]
    assert request["url"].endswith("/team/pr/discussions/1")
    assert branch["main"] == [".gitattributes"] and branch["revision"] == "try/this"
    assert branch["titles"][1:] == ["a try", "Add the card"]
    assert set(branch["files"]) >= MODEL


@pytest.mark.slow
def test_an_interrupted_upload_goes_on(pushed: dict[str, Any]) -> None:
    cut, card = pushed["interrupted"], pushed["card_cut"]
    assert all("Push again" in said for said in cut["said"]) and "500" in cut["said"][1]
    assert cut["held"] == cut["others"] and len(cut["held"]) == 1
    assert cut["second"] == [cut["broken"]]  # what the Hub has is not sent again
    assert cut["empty"] == [".gitattributes"] and cut["third"] == []
    assert cut["commits"] == 3 and set(cut["whole"]) >= MODEL
    assert "Push again" in card["said"] and card["puts"] == []
    assert card["pinned"][0] == card["pinned"][1] and card["pinned"][0] in card["card"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("401", "401 .*hf auth login"),
        ("403", "403 .*write"),
        ("other", "403 .*right to that name"),
        ("404", "404 .*no such repository or revision"),
        ("public", "exists and is public.*Nothing was uploaded"),
        ("429", "429 .*Wait"),
        ("503", "503 .*Push again"),
        ("drop", "failed .*Push again"),
    ],
)
def test_errors_of_the_hub_say_what_to_do(pushed: dict[str, Any], case: str, words: str) -> None:
    said = pushed["errors"]["said"][case]
    assert "hf_" not in said
    with pytest.raises(HubError, match=words):
        raise HubError(said)


@pytest.mark.slow
def test_nothing_is_left_of_a_push_that_was_refused(pushed: dict[str, Any]) -> None:
    assert not pushed["errors"]["made"] and pushed["errors"]["open"] == [".gitattributes", "a.txt"]


@pytest.mark.slow
def test_push_to_hub_of_every_class_is_complete(pushed: dict[str, Any]) -> None:
    repositories = pushed["every_class"]
    assert len(repositories) == 10
    for repo_id, (files, card) in repositories.items():
        assert CODE | {"config.json"} <= set(files), repo_id
        assert "library_name: transformers" in card, repo_id
    assert set(pushed["loaded"]["again"]) >= CODE


@pytest.mark.slow
def test_what_was_pushed_loads_by_its_id_without_the_package(pushed: dict[str, Any]) -> None:
    loaded = pushed["loaded"]
    assert len(loaded["equal"]) == 11 and all(loaded["equal"].values()), loaded["equal"]
    assert loaded["tokens"] == len("To the Hub.") and loaded["config"] == "AlibiConfig"
