"""Trainer with DeepSpeed's ZeRO-3 over two processes takes the course of one."""

from pathlib import Path

import pytest
import torch

from tests.distributed.processes import needs_gloo, run
from tests.distributed.training import assert_same_course, assert_same_weights, make_trainer, train
from tests.model.cases import build

pytest.importorskip("deepspeed", reason="needs deepspeed, which this package does not ask for")
WORKER = Path(__file__).with_name("deepspeed_worker.py")


@pytest.mark.slow
@needs_gloo
def test_two_processes_take_the_course_of_one(tmp_path: Path) -> None:
    build("six", torch.float32).save_pretrained(tmp_path / "source")
    run(WORKER, "2", tmp_path)
    trainer = make_trainer(tmp_path / "source", tmp_path / "one", sharing=1, save_strategy="no")
    expected = train(trainer)
    for rank in range(2):
        found = torch.load(tmp_path / f"found{rank}.pt")
        assert_same_course(found["zero3"], expected)
        assert_same_course(found["resumed"], expected)
    assert_same_weights(tmp_path / "saved", trainer.model)
