"""`accelerate launch` with the FSDP2 config runs the example for fine-tuning, and what it saves is whole."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.distributed.accelerated import CONFIGS
from tests.distributed.processes import ROOT, needs_gloo, run

LAUNCH = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "fsdp2_8_gpus.yaml")]
OPTIONS = ["--num_processes", "2", "--mixed_precision", "no", str(Path(__file__).with_name("launched.py"))]


@pytest.mark.slow
@needs_gloo
def test_fsdp2_runs_the_example_for_fine_tuning(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for index in range(12):
        (texts / f"{index}.txt").write_text("We the people of the United States. " * (30 + index))
    settings = {
        "--text": texts,
        "--length": 64,
        "--eval_lengths": 32,
        "--eval_tokens": 64,
        "--max_steps": 2,
        "--save_steps": 1,
        "--eval_strategy": "no",
        "--per_device_train_batch_size": 1,
        "--use_cpu": True,
        "--output_dir": tmp_path / "run",
    }
    arguments = [str(part) for pair in settings.items() for part in pair]
    printed = run(*LAUNCH, *OPTIONS, str(ROOT / "examples" / "finetune_trainer.py"), *arguments)
    assert printed.count("after 2 steps") == 1
    assert (tmp_path / "run" / "checkpoint-1" / "pytorch_model_fsdp_0").is_dir()  # in parts
    AutoModelForCausalLM.from_pretrained(tmp_path / "run", trust_remote_code=True)
