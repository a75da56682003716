"""The Python of a card runs as it stands, in the order in which a reader pastes it."""

import subprocess
import sys

import pytest
import torch

from alibi_hf import AlibiConfig, AlibiForCausalLM
from alibi_hf.hub import write_card
from tests.hub.carded import blocks, change, converted
from tests.model.test_remote_code import HEADS

PLACE = '"path/to/this/folder"'


def run(folder, only=slice(None), count=5):
    """Paste the blocks of the folder's card, and return what they leave."""
    made = blocks((folder / "README.md").read_text(encoding="utf-8"))
    assert len(made) == count and PLACE in made[0]
    session: dict = {}
    for block in made[only]:
        exec(compile(block.replace(PLACE, repr(str(folder))), "README.md", "exec"), session)
    return session


@pytest.mark.parametrize("with_tokenizer", [True, False])
@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_of_a_language_model(family, with_tokenizer, tmp_path):
    folder = converted(tmp_path / "folder", family, with_tokenizer)
    session = run(folder, slice(0, 3))
    batch, model = session["batch"], session["model"]
    assert (batch["attention_mask"][0] == 0).any() and batch["attention_mask"][:, -1].all()
    alone = batch["input_ids"][:1, batch["attention_mask"][0] == 1]
    with torch.no_grad():
        padded, whole = model(**batch).logits[0, -1], model(alone).logits[0, -1]
        wrong = model(batch["input_ids"]).logits[0, -1]  # the padding is seen
    assert torch.allclose(padded, whole, atol=1e-4) and not torch.allclose(wrong, whole, atol=1e-2)
    session = run(folder)
    assert session["long"].shape[1] == 2 * model.config.max_position_embeddings
    assert session["output"].shape[1] == session["long"].shape[1] + 20
    assert all(
        parameter.grad is not None for name, parameter in session["adapted"].named_parameters() if "lora_" in name
    )


@pytest.mark.parametrize(
    "auto", [auto for auto in HEADS if auto.__name__ != "AutoModelForCausalLM"], ids=lambda a: a.__name__
)
def test_of_the_other_heads(auto, tmp_path, capsys):
    folder = converted(tmp_path / "folder")
    config = AlibiConfig.from_pretrained(folder, pad_token_id=1)
    (folder / "model.safetensors").unlink()
    HEADS[auto](config).save_pretrained(folder)
    (folder / "conversion.json").unlink()
    write_card(folder)
    text = (folder / "README.md").read_text()
    assert f"from transformers import {auto.__name__}" in text and "generate(" not in text
    assert type(run(folder)["model"]).__name__ == HEADS[auto].__name__
    assert "torch.Size" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"learned_positions": True}, "ALiBi (linear distance) and a table of learned embeddings"),
        ({"learned_positions": True, "alibi": False}, "a table of learned embeddings"),
        ({"sinusoidal_positions": True, "alibi": False}, "sinusoidal embeddings"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "alibi": False}, "rotary embeddings"),
        ({"alibi": False}, "the causal mask alone"),
    ],
)
def test_of_other_positions(fields, said, tmp_path):
    """What a model with a ceiling cannot do is not promised."""
    folder = converted(tmp_path / "folder")
    config = AlibiConfig.from_dict({**AlibiConfig.from_pretrained(folder).to_dict(), **fields})
    AlibiForCausalLM(config).save_pretrained(folder)
    write_card(folder)
    text, ceiling = (folder / "README.md").read_text(), config.learned_positions
    assert f"Positions come from {said}; it was made for 64 tokens" in text
    for words in ("Longer than it was trained on", "longer inputs are allowed", "it goes on with a notice"):
        assert (words in text) is not ceiling
    assert ("It reads no more than 64 tokens" in text) is ceiling
    assert ("long" in run(folder, count=4 if ceiling else 5)) is not ceiling


def test_without_the_package(tmp_path):
    """In a fresh process that cannot import this package: all blocks but the one that needs it."""
    folder = converted(tmp_path / "folder")
    made = blocks((folder / "README.md").read_text())
    hidden = "import sys\nsys.modules['alibi_hf'] = None\n"
    code = "\n".join([hidden, made[0], *made[2:4], "print(type(model).__module__)"])
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PATH": "", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", code.replace(PLACE, repr(str(folder)))],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.splitlines()[-1].startswith("transformers_modules")


def test_a_tokenizer_with_code_of_its_own_is_not_used(tmp_path):
    folder = converted(tmp_path / "folder")
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_mine.Mine", None]})
    write_card(folder)
    text = (folder / "README.md").read_text()
    assert "AutoTokenizer" not in text and "take the source's" in text
    assert run(folder, slice(0, 1))["output"].shape == (1, 24)
