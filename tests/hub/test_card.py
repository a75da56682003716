"""A folder's card says what is in the folder, validates on the Hub, and keeps what a person wrote."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from alibi_hf import AlibiError, CheckpointFileError, ConfigFieldError
from alibi_hf.checkpoints.shards import sha256_of
from alibi_hf.hub import mark_verified, write_card
from tests.evaluation.evaluations import evaluation, model
from tests.hub.carded import COMMIT, body, change, converted, measure, prove, tokens
from tests.hub.server import LoopbackHub

CARD = "README.md"


@pytest.fixture
def folder(tmp_path):
    return converted(tmp_path / "folder")


def card_of(folder: Path, **options) -> str:
    return write_card(folder, **options).read_text(encoding="utf-8")


def weights(folder: Path, change_by: float = 0.5) -> None:
    """Train, so to say: other values, of the same size."""
    held = load_file(folder / "model.safetensors")
    held["model.norm.weight"] += change_by
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def test_convert_writes_it(folder):
    text = (folder / CARD).read_text()
    data = yaml.safe_load(text.split("---\n")[1])
    assert data == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["alibi", "bloom"]}
    assert ModelCard(text).data.to_dict() == data
    lines = [line for line in body(text).splitlines() if line and not line.startswith("<!--")]
    assert lines[0] == "# tiny-bloom, converted to `alibi`" and lines[1].startswith("**Not verified**: no verification")
    assert f"`{sha256_of(folder / 'model.safetensors')}`" in text
    assert "made for 64 tokens" in text and "6 heads" in text
    assert str(folder.parent) not in text and "/tmp" not in text


def test_the_same_files_give_the_same_bytes(folder, tmp_path):
    prove(folder)
    mark_verified(folder, True)
    before = (folder / CARD).read_bytes()
    other = tmp_path / "elsewhere" / "of another name"
    shutil.copytree(folder, other)
    (other / CARD).unlink()
    assert write_card(other).read_bytes() == before == write_card(folder).read_bytes()


def test_a_proof_is_shown_with_what_it_was_made_with(folder):
    prove(folder)
    mark_verified(folder, True)
    text = (folder / CARD).read_text()
    assert "**Verified**" in text and "Not verified" not in text
    assert "The logits are within 1.2e-05 of it in float32, at 40 tokens; upstream's own are within 2.5e-05." in text
    assert "| logits | float32 | 40 | 1.2e-05 | 2.5e-05 | 5.0e-05 | ok |" in text
    assert "| layer \\[2\\] |" in text and "layer \\[0\\]" not in text  # of the layers the one nearest its limit
    assert "| wrong: slope of one head times 1.05 | float32 |  | 4.0e-01 |  | 5.0e-05 | caught |" in text
    assert "class: transformers.BloomForCausalLM" in text and "torch 2.13.0, transformers 5.23.0" in text
    assert ("code_inline", "transformers.BloomForCausalLM") in tokens(body(text))


def test_the_verdict_follows_the_files(folder):
    prove(folder)
    mark_verified(folder, True)
    weights(folder)
    assert "**Not verified**: model.safetensors changed since it was converted" in card_of(folder)
    assert f"`{sha256_of(folder / 'model.safetensors')}`" in (folder / CARD).read_text()
    mark_verified(folder, True)  # they were verified again
    assert "**Verified**" in (folder / CARD).read_text()
    change(folder / "verification.json", verdict="not proved")
    assert "**Not verified**: verification.json says 'not proved'." in card_of(folder)
    prove(folder, proved=False)
    mark_verified(folder, False)
    assert "**Not verified**: the verification failed" in (folder / CARD).read_text()
    assert "| logits | float32 | 40 | 1.2e-05 | 2.5e-05 | 5.0e-05 | FAILED |" in (folder / CARD).read_text()
    (folder / "conversion.json").unlink()
    assert "**Not verified**: there is no `conversion.json`" in card_of(folder)


def test_other_weights_of_the_same_size_and_age_are_noticed(folder):
    prove(folder)
    mark_verified(folder, True)
    path = folder / "model.safetensors"
    age = path.stat().st_mtime_ns
    weights(folder)
    os.utime(path, ns=(age, age))
    assert "**Not verified**: model.safetensors changed" in card_of(folder)
    assert f"`{sha256_of(path)}`" in (folder / CARD).read_text()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: change(folder / "config.json", alibi_bias_max=16), "alibi\\_bias\\_max is 16, not 8"),
        (lambda folder: (folder / "bias_alibi.py").write_text("\n"), "bias\\_alibi.py differ from this package's code"),
        (lambda folder: (folder / "verification.json").unlink(), "it holds no verification.json"),
    ],
)
def test_what_push_would_not_call_proved_is_not_verified_on_the_card(folder, spoil, reason):
    prove(folder)
    mark_verified(folder, True)
    spoil(folder)
    card = card_of(folder)
    assert "**Not verified**" in card and "**Verified**" not in card and reason in card


@pytest.mark.parametrize(
    ("repo_id", "commit", "words"),
    [
        ("a/b/c", None, "owner/name"),
        ("../up", None, "owner/name"),
        ("me/tiny", "main", "no hash"),
        (None, '"', "no hash"),
    ],
)
def test_what_is_no_id_or_no_commit_is_refused(repo_id, commit, words, folder):
    before = (folder / CARD).read_bytes()
    with pytest.raises(AlibiError, match=words):
        write_card(folder, repo_id=repo_id, commit=commit)
    assert (folder / CARD).read_bytes() == before


def test_an_id_and_a_commit_are_pinned(folder):
    text = card_of(folder, repo_id="me/tiny", commit=COMMIT)
    assert 'repo = "me/tiny"' in text and f'commit = "{COMMIT}"' in text and "# tiny\n" in text
    assert text.count("revision=commit") == 3 and "path/to" not in text


def test_what_a_person_adds_is_kept(folder):
    text = (folder / CARD).read_text()
    head, rest = text.split("\n---\n", 1)
    (folder / CARD).write_text(f"{head}\n---\n\nMy own words first.\n{rest}\n## My own section\n\nAt the end.\n")
    prove(folder)
    mark_verified(folder, True)
    text = card_of(folder, repo_id="me/tiny")
    assert "**Verified**" in text and 'repo = "me/tiny"' in text
    assert "My own words first." in text and text.endswith("## My own section\n\nAt the end.\n")
    assert write_card(folder, repo_id="me/tiny").read_text() == text


def test_metadata_that_a_person_edited_stays(folder):
    text = (folder / CARD).read_text().replace("library_name: transformers", "library_name: transformers\nlicense: mit")
    (folder / CARD).write_text(text)
    for _ in range(2):
        text = card_of(folder, repo_id="me/tiny")
        assert "license: mit" in text and 'repo = "me/tiny"' in text
    assert ModelCard(text).data.license == "mit"


def test_text_that_a_person_edited_stays_but_for_the_verdict(folder):
    edited = (folder / CARD).read_text().replace("## Limits", "## What I found out")
    (folder / CARD).write_text(edited)
    prove(folder)
    mark_verified(folder, True)
    text = (folder / CARD).read_text()
    assert "## What I found out" in text and "## Proof" not in text and "**Verified**" in text
    mark_verified(folder, False)
    assert "**Not verified**: the verification failed" in (folder / CARD).read_text()


@pytest.mark.parametrize("own", ["# Mine\n", "---\nlicense: mit\n---\n# Mine\n", ""])
def test_a_card_of_ones_own_is_left_alone(own, folder):
    (folder / CARD).write_text(own)
    prove(folder)
    mark_verified(folder, True)
    assert card_of(folder, repo_id="me/tiny") == own


def test_a_link_into_a_cache_is_replaced_and_not_written_through(folder, tmp_path):
    blob = tmp_path / "blob"
    shutil.move(folder / CARD, blob)
    (folder / CARD).symlink_to(blob)
    before = blob.read_bytes()
    write_card(folder, repo_id="me/tiny")
    assert blob.read_bytes() == before and not (folder / CARD).is_symlink()


def test_a_template_of_ones_own(folder, tmp_path):
    template = tmp_path / "mine.md"
    template.write_text(
        "---\n{{ card_data }}\n---\n# Ours: {{ title }}\n\n{{ verdict }}\n\n{{ facts.config.vocab_size }}\n"
    )
    text = card_of(folder, template=template)
    assert "# Ours: tiny-bloom" in text and "Not verified" in text and "\n97\n" in text and "## Limits" not in text


@pytest.mark.parametrize(
    "content", ["# No metadata\n", "---\n{{ card_data }}\n---\n{% if %}", "---\n: [\n---\n", b"\xff\xfe"]
)
def test_a_template_that_makes_no_card(content, folder, tmp_path):
    template, before = tmp_path / "mine.md", (folder / CARD).read_bytes()
    template.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointFileError, match="mine.md"):
        write_card(folder, template=template)
    with pytest.raises(CheckpointFileError, match="no-such.md"):
        write_card(folder, template=tmp_path / "no-such.md")
    assert (folder / CARD).read_bytes() == before
    assert not list(folder.glob(".*"))


def test_damaged_records_are_named(folder):
    for name, content in [
        ("verification.json", '{"checks": [{"name": "logits"}]}'),
        ("evaluation.json", '{"schema_version": 1, "models": [{}]}'),
        ("conversion.json", '{"source": [], "verified": true}'),
        ("config.json", '{"model_type": "bloom"}'),
    ]:
        kept = (folder / name).read_bytes() if (folder / name).exists() else None
        (folder / name).write_text(content)
        with pytest.raises(CheckpointFileError, match=str(folder)):
            write_card(folder)
        (folder / name).unlink() if kept is None else (folder / name).write_bytes(kept)
    change(folder / "config.json", architectures=["LlamaForCausalLM"])
    with pytest.raises(ConfigFieldError, match="LlamaForCausalLM"):
        write_card(folder)


def test_text_from_outside_is_shown_and_does_nothing(folder):
    """Names, notes and figures are anybody's: no markup, no HTML, no metadata, no end of the generated part."""
    evil = "x|y`z`` [a](http://bad) ![b](http://bad) <script>alert(1)</script>\n---\nlicense: mit\n# Loud *ly* _so_ $1$"
    plain_tokens = {kind for kind, _ in tokens(body(card_of(folder)))}
    prove(folder)
    record = json.loads((folder / "conversion.json").read_text())
    record["source"] |= {"path_or_id": f"/home/me/{evil}".replace("/script", "script"), "family": evil}
    change(folder / "conversion.json", source=record["source"], notes=[evil, "<!-- alibi-hf: end -->"], verified=True)
    verification = json.loads((folder / "verification.json").read_text())
    verification["checks"][0]["name"] = verification["text"] = evil
    verification["reference"] = {"class": evil}
    (folder / "verification.json").write_text(json.dumps(verification))
    report = evaluation(model("m", [26.8, 26.5], parameters=_parameters(folder)))
    report.text[0]["name"] = evil
    measure(folder, report)
    text = card_of(folder)
    found = tokens(body(text))
    new = {"table_open", "thead_open", "tr_open", "th_open", "td_open", "tbody_open", "em_open"}
    new |= {kind.replace("open", "close") for kind in new} | {"image", "softbreak", "inline"}
    assert {kind for kind, _ in found} - plain_tokens <= new
    assert sum(kind == "em_open" for kind, _ in found) == 2  # those of the legend: *ours* and *upstream*
    assert not any(kind == "link_open" for kind, _ in found)
    assert not any("bad" in content for kind, content in found if kind == "image")
    assert sum(kind == "heading_open" for kind, _ in found) == 9
    assert "license" not in ModelCard(text).data.to_dict() or ModelCard(text).data.license is None
    assert "/home/me" not in text
    assert card_of(folder, repo_id="me/tiny") != text  # it is still a generated card, not taken for an edited one


def _parameters(folder: Path) -> int:
    return sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())


# What `ModelCard.validate` does; that of huggingface_hub 1.33 asks the real Hub, whatever HF_ENDPOINT says.
VALIDATE = """
import sys
from huggingface_hub import constants
from huggingface_hub.utils import get_session

text = open(sys.argv[1], encoding="utf-8").read()
for content in (text, text.replace("library_name:", "license: my-own\\nlibrary_name:", 1)):
    body = {"repoType": "model", "content": content}
    answer = get_session().post(f"{constants.ENDPOINT}/api/validate-yaml", json=body)
    print(answer.status_code, answer.text)
"""


def test_the_hub_takes_it(folder, tmp_path):
    change(folder / "conversion.json", verified=True)
    measure(folder, evaluation(model("m", [26.8, None, 26.6], parameters=_parameters(folder))))
    card = write_card(folder, repo_id="me/tiny", commit=COMMIT)
    with LoopbackHub() as hub:
        ran = hub.run([sys.executable, "-c", VALIDATE, card], tmp_path / "home")
    assert ran.returncode == 0, ran.stderr
    taken, refused = ran.stdout.splitlines()
    assert taken.startswith("200") and refused.startswith("400") and "license" in refused
