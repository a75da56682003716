"""`model_cards/`: made of one source, which agrees with the code that loads the checkpoints."""

import re
from collections import Counter

import pytest
import yaml
from huggingface_hub import ModelCard

from alibi_hf.checkpoints.export import TARGETS
from alibi_hf.cli import app
from alibi_hf.hub.card_metadata import LICENCES
from model_cards.make import cards
from model_cards.published import HERE, parameters, read_facts, slopes
from model_cards.shipped import SHIPPED

ENTRIES = read_facts()
SIZED = [entry for entry in ENTRIES if entry.own_config is not None]
COMMAND = re.compile(r"^alibi-hf (\w+) (.+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def made():
    return cards()


def test_making_them_again_gives_the_same_bytes(made):
    there = {
        path.name: path.read_bytes() for path in HERE.glob("*.md") if path.name not in ("upstream.md", "shipped.md")
    }
    assert there == {name: text.encode() for name, text in made.items()}


def test_every_checkpoint_has_a_card_of_its_own(made):
    names = [entry.name for entry in ENTRIES] + list(SHIPPED)
    assert max(Counter(name.lower() for name in names).values()) == 1
    assert {f"{name}.md" for name in names} | {"README.md"} == set(made)
    assert all(f"({name}.md)" in made["README.md"] for name in names)
    assert {entry.family for entry in ENTRIES} == {
        *("bloom", "mpt", "falcon", "baichuan", "btlm", "jais", "refact", "replit_lm", "mosaic_gpt", "step1")
    }


@pytest.mark.parametrize("entry", SIZED, ids=lambda entry: entry.name)
def test_the_facts_are_a_config_of_the_family(entry):
    config = entry.own_config
    assert config.alibi and config.hidden_size % config.num_attention_heads == 0
    total, inner = parameters(config)
    embedding = config.vocab_size * config.hidden_size
    assert total - inner == embedding * (1 if config.tie_word_embeddings else 2)
    if "parameters" in entry.facts:
        assert total == entry.facts["parameters"]
    power = bin(config.num_attention_heads).count("1") == 1
    assert ("two interleaved" in slopes(entry, config)) is (not power and entry.family not in ("btlm", "jais"))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("bloom-560m", "559,214,592"),  # as its card says
        ("bloom", "176,247,271,424"),
        ("Poro-34B", "34,216,949,760"),  # 34.2B on its card
        ("falcon-rw-1b", "1,311,625,216"),  # 1.31B on its card
        ("mpt-7b", "6,649,286,656"),
    ],
)
def test_the_sizes_are_those_of_the_checkpoints_own_cards(name, count, made):
    assert f"| parameters | {count} |" in made[f"{name}.md"]


def test_what_is_not_known_is_not_stated(made):
    assert not re.search(r"^\| (slopes|training length, tokens) ", made["mpt-7b-storywriter.md"], re.MULTILINE)
    assert "| vocabulary |" not in made["mpt-30b.md"] and "| parameters |" not in made["mpt-30b.md"]
    assert "Its sizes are not recorded here" in made["falcon-rw-7b.md"]
    assert "license:" not in made["Baichuan2-13B-Chat.md"].split("---")[1]


def test_metadata_passes_and_licences_are_those_of_the_hub(made):
    for name, text in made.items():
        if name != "README.md":
            data = ModelCard(text).data.to_dict()
            assert yaml.safe_load(text.split("---")[1]) == data
            assert data.get("license", "mit") in LICENCES and data["tags"][0] == "alibi"


def test_commands_name_real_verbs_and_options(made):
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands}
    for text in made.values():
        for verb, arguments in COMMAND.findall(text):
            assert verb in verbs
            assert set(re.findall(r"--[\w-]+", arguments)) <= {"--layerwise", "--to", "--no-tokenizer"}
            assert set(re.findall(r"--to (\S+)", arguments)) <= set(TARGETS)


def test_python_blocks_compile_and_name_the_checkpoint(made):
    for entry in ENTRIES:
        blocks = re.findall(r"^```python\n(.*?)^```", made[f"{entry.name}.md"], re.MULTILINE | re.DOTALL)
        assert len(blocks) == 2 and f'"{entry.id}"' in blocks[0]
        for block in blocks:
            compile(block, entry.name, "exec")


@pytest.mark.parametrize("name", SHIPPED)
def test_the_example_of_a_shipped_card_runs(name, made, capsys):
    (block,) = re.findall(r"^```python\n(.*?)^```", made[f"{name}.md"], re.MULTILINE | re.DOTALL)
    exec(compile(block.replace("max_new_tokens=300", "max_new_tokens=5"), name, "exec"), {})
    assert capsys.readouterr().out.startswith("My fellow citizens, the state of our Union")
