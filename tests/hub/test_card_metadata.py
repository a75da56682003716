"""The metadata of a card: the source's own words about licence, language and data, and what was measured."""

import json

import pytest
import yaml
from huggingface_hub import ModelCard

from alibi_hf import convert
from alibi_hf.checkpoints.source_card import read_source_card
from alibi_hf.hub import write_card
from tests.builders import bloom
from tests.evaluation.evaluations import evaluation, model
from tests.hub.carded import COMMIT, change, converted, measure


@pytest.fixture
def folder(tmp_path):
    return converted(tmp_path / "folder")


def data_of(folder, **options):
    return ModelCard(write_card(folder, **options).read_text(encoding="utf-8")).data.to_dict()


def said(folder, **card):
    """Let the source have said that, on the Hub."""
    source = json.loads((folder / "conversion.json").read_text())["source"]
    change(folder / "conversion.json", source={**source, "card": card})


def from_hub(folder, repo="bigscience/tiny", revision=COMMIT):
    source = json.loads((folder / "conversion.json").read_text())["source"]
    change(folder / "conversion.json", source={**source, "path_or_id": repo, "revision": revision})


@pytest.mark.parametrize(
    ("front", "kept"),
    [
        ("license: mit\nlanguage: [fi, en]\nextra: 1", {"license": "mit", "language": ["fi", "en"]}),
        ("language: no", {"language": "no"}),  # Norwegian, which YAML 1.1 reads as false
        ("language: [no, sv]", {"language": ["no", "sv"]}),
        ("license: [mit, apache-2.0]", {"license": ["mit", "apache-2.0"]}),
        ("license: 2020-01-01\ndatasets: {a: 1}", {}),
        ("license: other\nlicense_name: rail\nlicense_link: LICENSE", {"license": "other", "license_name": "rail"}),
        ('license: "mit\\nlanguage: xx"', {}),  # more than one line is no licence
        ("license: [", {}),
        ("a: &a [*a]", {}),
    ],
)
def test_the_source_card_is_read_and_nothing_is_made_of_it(front, kept, tmp_path):
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# Model\n")
    found = read_source_card(tmp_path)
    assert {name: value for name, value in found.items() if name != "license_link"} == kept


def test_a_source_without_a_card_says_nothing(tmp_path):
    assert read_source_card(tmp_path) == {}
    (tmp_path / "README.md").write_bytes(b"\xff\xfe---")
    assert read_source_card(tmp_path) == {}


def test_it_goes_from_the_sources_card_through_the_record_to_ours(tmp_path):
    source = bloom(tmp_path / "source")
    (source / "README.md").write_text("---\nlicense: mit\nlanguage: [no]\ndatasets: [mc4]\nbase_model: a/b\n---\n")
    convert(source, tmp_path / "out", verify=False)
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert record["source"]["card"] == {"license": "mit", "language": ["no"], "datasets": ["mc4"]}
    text = (tmp_path / "out" / "README.md").read_text()
    found = yaml.safe_load(text.split("---\n")[1])
    assert (found["license"], found["language"], found["datasets"]) == ("mit", ["no"], ["mc4"])
    assert "base_model" not in found and "As the source's card says: `mit`" in text


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ({"license": "apache-2.0"}, {"license": "apache-2.0"}),
        ({"license": "My Own, v2"}, {"license": "other", "license_name": "my-own-v2"}),
        (
            {"license": "other", "license_name": "rail", "license_link": "https://a.b/c"},
            {"license": "other", "license_name": "rail", "license_link": "https://a.b/c"},
        ),
        (
            {"license": "other", "license_name": "rail", "license_link": "TERMS.md"},
            {
                "license": "other",
                "license_name": "rail",
                "license_link": f"https://huggingface.co/bigscience/tiny/blob/{COMMIT}/TERMS.md",
            },
        ),
        ({"license": "mit", "license_link": "../../etc/passwd"}, {"license": "mit"}),
        ({"license_name": "rail"}, {}),
        ({"license": ["mit", "apache-2.0"]}, {"license": ["mit", "apache-2.0"]}),
        ({}, {}),
    ],
)
def test_a_licence_is_said_as_the_hub_wants_it(card, licence, folder):
    from_hub(folder)
    said(folder, **card)
    found = data_of(folder)
    assert {name: value for name, value in found.items() if name.startswith("license")} == licence
    text = (folder / "README.md").read_text()
    assert ("The source names no licence" in text) is not bool(licence)


def test_a_licence_file_is_named_and_not_read_for_a_licence(folder):
    (folder / "LICENSE").write_text("MIT License")
    assert "license" not in data_of(folder)
    assert "The source's `LICENSE` is in this folder" in (folder / "README.md").read_text()


def test_what_the_hub_would_refuse_is_left_out(folder):
    said(folder, language=["en", "English", "fi"], datasets=["a/b", "c d", "../e"])
    found = data_of(folder)
    assert found["language"] == ["en", "fi"] and found["datasets"] == ["a/b"]


def test_a_source_on_the_hub_is_the_base_model_and_a_folder_is_not(folder):
    assert "base_model" not in data_of(folder)
    from_hub(folder)
    found = data_of(folder)
    assert found["base_model"] == "bigscience/tiny" and "base_model_relation" not in found
    text = (folder / "README.md").read_text()
    assert f"[`bigscience/tiny`](https://huggingface.co/bigscience/tiny) at revision `{COMMIT}`" in text
    from_hub(folder, repo="../evil")
    assert "base_model" not in data_of(folder)


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("AlibiForCausalLM", "text-generation"),
        ("AlibiForSequenceClassification", "text-classification"),
        ("AlibiForTokenClassification", "token-classification"),
        ("AlibiForQuestionAnswering", "question-answering"),
        ("AlibiModel", "feature-extraction"),
    ],
)
def test_the_task_is_that_of_the_head(architecture, task, folder):
    change(folder / "config.json", architectures=[architecture])
    assert data_of(folder)["pipeline_tag"] == task


def test_perplexities_become_results_that_say_what_was_measured(folder):
    size = _size(folder)
    models = [
        model("ours", [26.8, None, 26.6], [31.0, 29.0, 28.0], parameters=size),
        model("upstream", [27.8, None, None], model_class="BloomForCausalLM", parameters=size),
        model("another size", [9.0, 9.0, 9.0], parameters=size + 1),
    ]
    measure(folder, evaluation(*models))
    card = ModelCard(write_card(folder, repo_id="me/tiny", commit=COMMIT).read_text())
    results = card.data.eval_results
    found = {(result.dataset_config, result.metric_args["length"]): result.metric_value for result in results}
    assert found == {
        ("non-overlapping windows", 256): 31.0,
        ("non-overlapping windows", 512): 29.0,
        ("non-overlapping windows", 1024): 28.0,
        ("sliding windows", 256): 26.8,
        ("sliding windows", 1024): 26.6,
    }
    assert card.data.model_name == "tiny" and card.data.metrics == ["perplexity"]
    assert {result.dataset_name for result in results} == {"held-out.txt"}
    assert {result.dataset_revision for result in results} == {"0f" * 32}
    assert {result.source_url for result in results} == {
        f"https://huggingface.co/me/tiny/blob/{COMMIT}/evaluation.json"
    }
    assert "| 512 | fails | 29.00 |" in card.text and "![Perplexity by length](evaluation.png)" in card.text


def test_of_two_models_like_this_one_neither_is_taken(folder):
    size = _size(folder)
    measure(folder, evaluation(model("a", [26.8], parameters=size), model("b", [27.0], parameters=size)))
    assert "model-index" not in data_of(folder)
    measure(folder, evaluation(model("a", [26.8], parameters=size), model("folder", [27.0], parameters=size)))
    assert data_of(folder)["model-index"][0]["results"][0]["metrics"][0]["value"] == 27.0


def _size(folder):
    from safetensors.torch import load_file

    return sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
