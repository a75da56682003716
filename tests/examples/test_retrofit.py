"""`examples/retrofit.py` on tiny settings."""

import importlib
import json
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TOKENIZER = EXAMPLES / "checkpoints" / "sotu-bloom"
SENTENCES = ("The Congress meets today. ", "Peace is with all nations. ", "The debt is paid. ")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the example with some arguments; returns its status, what it printed, and the folder it wrote."""
    (tmp_path / "text.txt").write_text("".join(SENTENCES[i * i % 3] for i in range(600)))
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("retrofit")

    def main(**options):
        usual = {"text": tmp_path / "text.txt", "output_dir": tmp_path / "out", "length": 16, "max_steps": 30}
        usual |= {"eval_steps": 10, "warmup_steps": 2, "hidden_size": 16, "source_steps": 60, "held_out_tokens": 128}
        options = {**usual, "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2, "longest": 4, **options}
        arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", ["retrofit.py", *arguments])
        status = example.main()
        return status, capsys.readouterr(), tmp_path / "out"

    return main


@pytest.mark.slow
def test_a_new_gpt2_is_retrofitted_trained_on_and_read_past_its_length(run):
    status, printed, out = run()
    assert status == 0, printed.err
    figures = json.loads((out / "figures.json").read_text())
    table = figures["perplexity_by_length"]
    assert table["source"]["16"] > 1 and table["source"]["32"] is None and table["source"]["64"] is None
    assert all(value is not None for value in table["retrofitted, trained on"].values())
    assert table["retrofitted, trained on"]["64"] < table["retrofitted"]["64"]
    steps = figures["perplexity_by_step"]["retrofitted"]
    assert list(steps) == ["0", "10", "20", "30"]
    reached = [int(step) for step, value in steps.items() if value <= table["source"]["16"]]
    assert figures["recovered_after"] == (min(reached) if reached else None)
    assert "computes something else than its source" in printed.out and "fails" in printed.out
    assert (out / "retrofit.png").stat().st_size > 1000
    assert (out / "perplexity.csv").read_text().count("\n") == 1 + 4 * 3 + 2 * 4
    assert (out / "trained" / "modeling_alibi.py").is_file()


@pytest.mark.slow
def test_a_llama_folder_is_retrofitted(run, tmp_path):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=4096, num_key_value_heads=1, head_dim=8, max_position_embeddings=32, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(tmp_path / "llama")
    status, printed, out = run(source=tmp_path / "llama", max_steps=4, eval_steps=0.5)  # a share of all steps
    assert status == 0, printed.err
    assert "rotary positions" in printed.out
    assert list(json.loads((out / "figures.json").read_text())["perplexity_by_step"]["source"]) == ["0", "2", "4"]
    assert json.loads((out / "figures.json").read_text())["perplexity_by_length"]["source"]["64"] is not None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"source": TOKENIZER}, "has ALiBi already"),
        ({"text": "/no/such/text.txt"}, "/no/such/text.txt"),
        ({"held_out_tokens": 10}, "10 tokens are held out"),
        ({"length": 1}, "--length 1 is too small"),
        ({"longest": 0}, "--longest 0 is too small"),
        ({"source_steps": 0}, "--source_steps 0 is too small"),
        ({"max_steps": -1}, "--max_steps -1 is too small"),
        ({"bias_max": 0}, "--bias_max 0.0 must be positive"),
        ({"resume_from_checkpoint": "true"}, "not resumed"),
    ],
)
def test_bad_input_ends_with_one_line(run, options, words):
    status, printed, out = run(**options)
    assert status == 2 and not out.exists()
    assert words in printed.err.strip().splitlines()[-1]
    assert "Traceback" not in printed.err
