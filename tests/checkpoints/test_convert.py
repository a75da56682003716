"""The folder that a conversion leaves, and that an error leaves nothing."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from alibi_hf.checkpoints import writer
from alibi_hf.checkpoints.convert import convert
from alibi_hf.checkpoints.source import Checkpoint
from alibi_hf.errors import CheckpointFileError, ConfigFieldError, TensorError
from alibi_hf.model.modeling_alibi import AlibiForCausalLM
from tests.all_families import FAMILIES
from tests.builders import bloom, distance, falcon, foundry, ids, mpt, tokenizer

CODE = {path.name for path in (Path(__file__).parents[2] / "alibi_hf" / "model").glob("*_alibi.py")}


def read(path):
    return json.loads(path.read_text())


def quick(source, out, **kwargs):
    return convert(source, out, verify=False, **kwargs)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_is_complete_and_its_record_true(family, tmp_path):
    source, out = FAMILIES[family](tmp_path / "source", shards=2), tmp_path / "out"
    conversion = quick(source, out, max_shard_size="60KB", command="the command")
    record = read(out / "conversion.json")
    assert record == conversion.to_dict() and record["schema_version"] == 1 and record["verified"] is None
    assert record["source"]["family"] == family and record["command"] == "the command"
    for side, folder in (("source", source), ("output", out)):
        files = record[side]["files"]
        assert len(files) >= 2
        for file in files:
            data = (folder / file["name"]).read_bytes()
            assert (file["sha256"], file["bytes"]) == (hashlib.sha256(data).hexdigest(), len(data))
    assert {row["source"] for row in record["tensors"]} == set(Checkpoint.open(source).tensors)
    assert {row["fate"] for row in record["tensors"]} <= {"used", "tied", "dropped"}
    assert record["config"]["from"] == read(source / "config.json") and record["config"]["defaults"]
    config = read(out / "config.json")
    assert len(config["auto_map"]) == 6 and config["architectures"] == ["AlibiForCausalLM"]
    assert read(out / "generation_config.json")["use_cache"] is True
    assert {path.name for path in out.iterdir()} >= CODE and (out / "README.md").read_text().count("Not verified") == 1
    assert not list(tmp_path.glob(".*")), "the working folder is gone"


def test_shards_are_as_small_as_asked_and_the_index_is_right(tmp_path):
    out = tmp_path / "out"
    quick(mpt(tmp_path / "source"), out, max_shard_size=20_000)
    index = read(out / "model.safetensors.index.json")
    held = {}
    for name in set(index["weight_map"].values()):
        part = load_file(out / name)
        assert sum(t.nbytes for t in part.values()) <= 20_000 or len(part) == 1
        assert all(index["weight_map"][tensor] == name for tensor in part)
        held |= part
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in held.values())


@pytest.mark.parametrize("size", ["5GB", "3KB"])
@pytest.mark.parametrize("family", ["bloom", "mpt", "falcon"])
def test_a_tied_head_that_is_stored_is_not_written_again(family, size, tmp_path):
    source = FAMILIES[family](tmp_path / "source", layers=1)
    convert(source, tmp_path / "without", verify=False, max_shard_size=size)
    tensors = load_file(source / "model.safetensors")
    embedding = next(name for name in tensors if name.endswith(("word_embeddings.weight", "wte.weight")))
    save_file({**tensors, "lm_head.weight": tensors[embedding].clone()}, source / "model.safetensors")
    conversion = convert(source, tmp_path / "out", verify=False, max_shard_size=size, workers=2)
    assert [row["fate"] for row in conversion.tensors if row["source"] == "lm_head.weight"] == ["tied"]
    for file in (tmp_path / "without").glob("model*"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_one_shard_has_no_index_and_stale_files_go(tmp_path):
    out = tmp_path / "out"
    source = mpt(tmp_path / "source")
    quick(source, out, max_shard_size=20_000)
    quick(source, out, overwrite=True)
    assert [path.name for path in out.glob("model*.safetensors*")] == ["model.safetensors"]


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "float64"])
def test_dtype(dtype, tmp_path):
    source, out = bloom(tmp_path / "source"), tmp_path / "out"
    quick(source, out, dtype=dtype)
    expected = getattr(torch, str(dtype).removeprefix("torch."))
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {expected}
    assert AlibiForCausalLM.from_pretrained(out).dtype == expected
    assert read(out / "config.json")["dtype"] == str(expected).removeprefix("torch.")


def test_dtype_of_the_source_is_kept(tmp_path):
    quick(bloom(tmp_path / "source", dtype=torch.bfloat16), tmp_path / "out")
    assert AlibiForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_values_that_float16_cannot_hold(tmp_path):
    source = bloom(tmp_path / "source")
    held = load_file(source / "model.safetensors")
    held["transformer.ln_f.weight"][0] = 1e6
    save_file(held, source / "model.safetensors")
    with pytest.raises(TensorError, match=r"ln_f.weight has 1 values .* 1e\+06"):
        quick(source, tmp_path / "out", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_tokenizer_chat_template_generation_and_licence_are_carried_over(tmp_path):
    source, out = tokenizer(bloom(tmp_path / "source")), tmp_path / "out"
    (source / "generation_config.json").write_text(json.dumps({"temperature": 0.7, "use_cache": False}))
    (source / "LICENSE").write_text("terms")
    (source / "README.md").write_text("---\nlicense: bigscience-bloom-rail-1.0\nlanguage: [fi]\n---\n# Model\n")
    quick(source, out)
    before, after = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert after("Hello")["input_ids"] == before("Hello")["input_ids"] and after.pad_token == "<pad>"
    assert after.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert read(out / "generation_config.json") == {"temperature": 0.7, "use_cache": True}
    card = (out / "README.md").read_text()
    assert "license: bigscience-bloom-rail-1.0" in card and "- fi" in card and (out / "LICENSE").exists()


def test_a_tokenizer_whose_class_only_the_model_type_named(tmp_path):
    source, out = tokenizer(bloom(tmp_path / "source")), tmp_path / "out"
    settings = read(source / "tokenizer_config.json")
    settings.pop("tokenizer_class")
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    quick(source, out)
    assert AutoTokenizer.from_pretrained(out, trust_remote_code=True)("Hello")["input_ids"]


def test_no_licence_is_never_guessed(tmp_path):
    quick(bloom(tmp_path / "source"), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license:" not in card and "names no licence" in card


def test_generation_fields_of_an_old_config_reach_the_generation_config(tmp_path):
    quick(bloom(tmp_path / "source", raw={"temperature": 0.5}), tmp_path / "out")
    written = read(tmp_path / "out" / "generation_config.json")
    assert written == {"temperature": 0.5, "bos_token_id": 1, "eos_token_id": 2, "use_cache": True}


def test_a_classifier_keeps_its_head(tmp_path):
    from transformers import AutoModelForSequenceClassification, BloomForSequenceClassification

    source = bloom(tmp_path / "plain")
    model = BloomForSequenceClassification.from_pretrained(source, num_labels=3, pad_token_id=0)
    model.save_pretrained(tmp_path / "source")
    quick(tmp_path / "source", tmp_path / "out")
    ours = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", trust_remote_code=True)
    with torch.no_grad():
        assert distance(ours.eval()(ids() + 0).logits, model.eval()(ids()).logits) < 2e-6


@pytest.mark.slow
def test_it_loads_where_the_package_is_not(tmp_path):
    source, out = foundry(tmp_path / "source", attn_config={"qk_ln": True}), tmp_path / "out"
    quick(source, out)
    torch.save(ids(), tmp_path / "ids.pt")
    script = (
        "import sys, torch\n"
        "sys.modules['alibi_hf'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=True).eval()\n"
        f"torch.save(model(torch.load({str(tmp_path / 'ids.pt')!r})).logits, {str(tmp_path / 'logits.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, capture_output=True)
    with torch.no_grad():
        ours = AlibiForCausalLM.from_pretrained(out).eval()(ids()).logits
    assert distance(torch.load(tmp_path / "logits.pt"), ours) == 0


def test_falcons_rounding_is_written_down(tmp_path):
    quick(falcon(tmp_path / "source"), tmp_path / "out", alibi_rounding="falcon")
    config = read(tmp_path / "out" / "config.json")
    assert config["alibi_rounding"] == "falcon" and len(config["alibi_slopes"]) == 6


def test_progress_reaches_the_end(tmp_path):
    seen = []
    quick(mpt(tmp_path / "source"), tmp_path / "out", progress=lambda *step: seen.append(step))
    assert seen[-1][1] == seen[-1][2] > 0 and [step[1] for step in seen] == sorted(step[1] for step in seen)


def nonfinite(source):
    held = load_file(source / "model.safetensors")
    held["transformer.norm_f.weight"][5] = float("nan")
    save_file(held, source / "model.safetensors")


def test_an_error_in_the_middle_leaves_nothing(tmp_path):
    source, out = mpt(tmp_path / "source"), tmp_path / "out"
    nonfinite(source)
    with pytest.raises(TensorError, match=r"norm_f.weight holds 1 NaN and 0 Inf"):
        quick(source, out)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    quick(source, out, allow_nonfinite=True)
    assert torch.isnan(load_file(out / "model.safetensors")["model.norm.weight"]).sum() == 1


def test_an_error_leaves_what_was_there(tmp_path):
    source, out = mpt(tmp_path / "source"), tmp_path / "out"
    quick(source, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    nonfinite(source)
    with pytest.raises(TensorError):
        quick(source, out, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_full_folder_needs_overwrite(tmp_path):
    source, out = mpt(tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    quick(source, out)  # empty is as good as absent
    with pytest.raises(CheckpointFileError, match=r"not empty; --overwrite"):
        quick(source, out)
    (out / "mine.txt").write_text("old")
    quick(source, out, overwrite=True)
    assert not (out / "mine.txt").exists()


def test_a_file_the_source_itself_and_an_interrupted_run_are_refused(tmp_path):
    source = mpt(tmp_path / "models" / "source")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointFileError, match=r"is a file"):
        quick(source, tmp_path / "file")
    for out in (source, source.parent):
        with pytest.raises(CheckpointFileError, match=r"would replace the source"):
            quick(source, out, overwrite=True)
    (tmp_path / ".out.partial").mkdir()
    with pytest.raises(CheckpointFileError, match=r"cut off; use --overwrite"):
        quick(source, tmp_path / "out")
    quick(source, tmp_path / "out", overwrite=True)
    assert not (tmp_path / ".out.partial").exists()


def test_a_place_where_nothing_can_be_made_is_named(tmp_path):
    source = mpt(tmp_path / "source", layers=1)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for out in (source / "config.json" / "out", tmp_path / "loop"):
        with pytest.raises(CheckpointFileError, match=r"cannot be (made|written): .* [Cc]hoose"):
            quick(source, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loop", "source"]


def test_the_disk_is_checked_first(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointFileError, match=r"needs .* GB, .* has 0.00 GB free"):
        quick(mpt(tmp_path / "source"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(("size", "number"), [("5GB", 5 * 10**9), ("512MiB", 2**29), (10, 10), ("1.5kb", 1500)])
def test_sizes(size, number):
    assert writer.parse_size(size) == number


@pytest.mark.parametrize("size", ["many", "5 parsecs", "-1GB", 0])
def test_sizes_that_are_none(size):
    with pytest.raises(CheckpointFileError, match=r"max_shard_size="):
        writer.parse_size(size)


def test_unknown_dtype(tmp_path):
    with pytest.raises(ConfigFieldError, match=r"dtype='int4'"):
        quick(mpt(tmp_path / "source"), tmp_path / "out", dtype="int4")


class Outcome:
    """What `verify` returns, as far as `convert` looks at it."""

    def __init__(self, proved):
        self.proved = proved

    def save(self, directory):
        verdict = "proved" if self.proved else "not proved"
        (Path(directory) / "verification.json").write_text(json.dumps({"verdict": verdict}))


@pytest.mark.parametrize(("proved", "words"), [(True, "**Verified**"), (False, "the verification failed")])
def test_the_verdict_is_stored_and_the_folder_stays(proved, words, tmp_path, monkeypatch):
    seen = {}

    def verify(source, output, **options):
        seen.update(options, source=source)
        return Outcome(proved)

    monkeypatch.setattr("alibi_hf.verification.verify", verify)
    source, out = mpt(tmp_path / "source"), tmp_path / "out"
    conversion = convert(source, out, device="cpu", allow_pickle=True)
    assert seen["source"] == source and seen["allow_pickle"] is True and seen["device"] == "cpu"
    assert conversion.verified is proved and read(out / "conversion.json")["verified"] is proved
    assert words in (out / "README.md").read_text() and (out / "verification.json").exists()
    assert AlibiForCausalLM.from_pretrained(out)


def test_a_verification_that_cannot_run_leaves_an_unverified_folder(tmp_path, monkeypatch):
    def verify(source, output, **options):
        raise CheckpointFileError("not enough memory")

    monkeypatch.setattr("alibi_hf.verification.verify", verify)
    with pytest.raises(CheckpointFileError, match=r"not enough memory"):
        convert(mpt(tmp_path / "source"), tmp_path / "out")
    assert read(tmp_path / "out" / "conversion.json")["verified"] is None


@pytest.mark.slow
def test_memory_is_that_of_one_tensor_whatever_the_size(tmp_path):
    """Anonymous memory over the start stays below a third of the 96 MiB that are converted; one tensor is 4 MiB."""
    source = bloom(tmp_path / "source", heads=64, layers=8, raw={"vocab_size": 97})
    script = (
        "import sys, threading, time\n"
        "from alibi_hf.checkpoints.convert import convert\n"
        "def held():\n"
        "    line = next(line for line in open('/proc/self/status') if line.startswith('RssAnon'))\n"
        "    return int(line.split()[1]) / 1024\n"
        "convert(sys.argv[1], sys.argv[2], verify=False)\n"  # imports and first-use costs
        "start, peak, running = held(), [0.0], [True]\n"
        "def watch():\n"
        "    while running[0]:\n"
        "        peak[0] = max(peak[0], held())\n"
        "        time.sleep(0.002)\n"
        "thread = threading.Thread(target=watch); thread.start()\n"
        "convert(sys.argv[1], sys.argv[2], verify=False, overwrite=True)\n"
        "running[0] = False; thread.join()\n"
        "print(peak[0] - start)\n"
    )
    if not Path("/proc/self/status").exists():
        pytest.skip("reads /proc")
    command = [sys.executable, "-c", script, str(source), str(tmp_path / "out")]
    ran = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert float(ran.stdout.split()[-1]) < 32
