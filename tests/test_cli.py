"""The command line: every verb, its exit status, and one line on standard error for bad input."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from alibi_hf.cli import app

SOURCE = "examples/checkpoints/sotu-mpt"


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "out"
    status, out, _ = run("convert", SOURCE, folder, "--no-verify")
    assert status == 0
    assert "not verified" in out
    return folder


def test_inspect_shows_family_slopes_and_every_tensor(tmp_path):
    status, out, _ = run("inspect", SOURCE)
    assert status == 0
    for words in ("mpt", "3,443,136 parameters", "0.25, 0.0625", "Wqkv", "wte.weight"):
        assert words in out


def test_inspect_json_is_json():
    status, out, _ = run("inspect", SOURCE, "--json")
    report = json.loads(out)
    assert status == 0
    assert report["family"] == "mpt"
    assert len(report["tensors"]) == 38
    assert {tensor["fate"] for tensor in report["tensors"]} <= {"used", "tied", "dropped"}


def test_families_lists_all():
    status, out, _ = run("families")
    assert status == 0
    assert all(name in out for name in ("bloom", "mpt", "falcon"))


def test_export_goes_back_bit_for_bit_and_to_gguf(converted, tmp_path):
    status, out, _ = run("export", converted, tmp_path / "back", "--to", "mpt", "--max-shard-size", "1MB")
    assert status == 0
    assert all(words in out for words in ("mpt (MptForCausalLM)", "38 used, 0 padded", "upstream's own"))
    held = {name: tensor for file in (tmp_path / "back").glob("*.safetensors") for name, tensor in load(file).items()}
    source = load(Path(SOURCE) / "model.safetensors")
    assert held.keys() == source.keys() and all(held[name].equal(source[name]) for name in source)
    status, out, _ = run("export", converted, tmp_path / "gguf", "--to", "gguf", "--dtype", "q8_0", "--json")
    assert status == 0
    assert json.loads(out) == json.loads((tmp_path / "gguf" / "export.json").read_text())
    status, out, _ = run("export", converted, tmp_path / "gguf", "--to", "gguf", "--overwrite", "--quiet")
    assert (status, out) == (0, "")
    assert [path.name for path in (tmp_path / "gguf").glob("*.gguf")] == ["model-bf16.gguf"]


def load(path):
    from safetensors.torch import load_file

    return load_file(path)


def test_verify_proves_and_writes_the_report(converted):
    status, out, _ = run("verify", SOURCE, converted, "--lengths", "32,300")
    assert status == 0
    assert "proved" in out
    assert json.loads((converted / "verification.json").read_text())["verdict"] == "proved"
    assert (converted / "verification.md").is_file() and (converted / "verification.html").is_file()
    assert json.loads((converted / "conversion.json").read_text())["verified"] is True
    assert "**Verified**" in (converted / "README.md").read_text()


def test_verify_of_another_models_weights_exits_1(converted, tmp_path):
    from safetensors.torch import load_file, save_file

    wrong = tmp_path / "wrong"
    shutil.copytree(converted, wrong)
    tensors = load_file(wrong / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors[name] = tensors[name].roll(1, 0).clone()
    save_file(tensors, wrong / "model.safetensors", metadata={"format": "pt"})
    status, _, err = run("verify", SOURCE, wrong, "--lengths", "32", "--quiet")
    assert status == 1
    assert "not proved" in err
    assert json.loads((wrong / "conversion.json").read_text())["verified"] is False
    assert "**Not verified**: the verification failed" in (wrong / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "/nowhere/at/all"], "not a folder"),
        (["convert", SOURCE, "OUT", "--dtype", "int3"], "int3"),
        (["convert", SOURCE, "OUT", "--alibi-rounding", "falcon"], "falcon"),
        (["convert", SOURCE, "FULL"], "overwrite"),
        (["verify", SOURCE, "FULL", "--lengths", "ten"], "ten"),
        (["verify", SOURCE, "FULL", "--text", "/no/such/text"], "/no/such/text"),
        (["export", SOURCE, "OUT", "--to", "mpt"], "alibi-hf convert"),
        (["export", "CONVERTED", "OUT", "--to", "falcon"], "alibi_bias_max=8"),
        (["export", "CONVERTED", "OUT", "--to", "onnx"], "to='onnx'"),
        (["export", "CONVERTED", "OUT", "--to", "gguf", "--dtype", "q3"], "q8_0"),
        (["export", "CONVERTED", "FULL", "--to", "mpt"], "overwrite"),
    ],
)
def test_bad_input_exits_2_with_one_line(arguments, words, tmp_path, converted):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a file").write_text("x")
    places = {"OUT": tmp_path / "out", "FULL": tmp_path / "full", "CONVERTED": converted}
    status, out, err = run(*[places.get(argument, argument) for argument in arguments])
    assert status == 2
    assert words in err
    assert "Traceback" not in out + err
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_a_part_of_the_proof_does_not_replace_it(converted):
    run("verify", SOURCE, converted, "--lengths", "32")
    before = (converted / "verification.json").read_text()
    status, out, _ = run("verify", SOURCE, converted, "--lengths", "32", "--only", "bias,tensors")
    assert status == 0
    assert "tensors" in out
    assert (converted / "verification.json").read_text() == before
    assert "**Verified**" in (converted / "README.md").read_text()


def test_layer_by_layer_is_a_whole_proof(converted):
    status, out, _ = run("verify", SOURCE, converted, "--lengths", "32", "--layerwise")
    assert status == 0
    assert "layer [" in out
    saved = json.loads((converted / "verification.json").read_text())
    assert saved["verdict"] == "proved" and saved["parts"] == ["bias", "tensors", "layers"]
    status, _, err = run("verify", SOURCE, converted, "--layerwise", "--only", "bias")
    assert status == 2
    assert "give one" in err


def test_convert_passes_on_workers_resume_and_layerwise(tmp_path):
    status, out, _ = run("convert", SOURCE, tmp_path / "out", "--layerwise", "--resume", "--workers", "2")
    assert status == 0
    assert "proved" in out
    parts = json.loads((tmp_path / "out" / "verification.json").read_text())["parts"]
    assert parts == ["bias", "tensors", "layers"]


def test_a_device_that_is_not_there_exits_2_before_writing(tmp_path):
    status, _, err = run("convert", SOURCE, tmp_path / "out", "--device", "nope")
    assert status == 2
    assert "nope" in err
    assert not (tmp_path / "out").exists()


def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch):
    source = Path(SOURCE).resolve()
    monkeypatch.chdir(tmp_path)
    status, _, err = run("convert", source, ".", "--no-verify")
    assert status == 2
    assert "current folder" in err
    assert not list(tmp_path.parent.glob(".*partial"))


def test_nothing_is_left_of_folders_made_for_a_failed_output(tmp_path):
    from safetensors.torch import load_file, save_file

    source = tmp_path / "source"
    shutil.copytree(SOURCE, source)
    tensors = load_file(source / "model.safetensors")
    tensors["transformer.wte.weight"][0, 0] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    status, _, err = run("convert", source, tmp_path / "new" / "deep" / "out", "--no-verify")
    assert status == 2
    assert "1 NaN" in err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": 3}, "config.json"),
        ({"torch_dtype": "nn", "dtype": None}, "nn"),
        ({"logit_scale": float("inf")}, "Infinity is no number"),
        ({"emb_pdrop": 2.0}, "embedding_dropout"),
        ({"max_seq_len": 0}, "max_position_embeddings"),
        ({"head_dim": 0}, "head_dim"),
    ],
    ids=str,
)
def test_impossible_config_values_exit_2(change, words, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(SOURCE, source)
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    status, _, err = run("convert", source, tmp_path / "out", "--no-verify")
    assert status == 2
    assert words in err
    assert not (tmp_path / "out").exists()


def test_a_padding_token_outside_the_vocabulary_is_proved_all_the_same(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(SOURCE, source)
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token_id": -1}))
    assert run("convert", source, tmp_path / "out", "--quiet")[0] == 0
