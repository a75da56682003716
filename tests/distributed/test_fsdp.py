"""Trainer with FSDP2 over two processes takes the course of one process: packed, saved, and resumed."""

from pathlib import Path

import pytest
import torch

from tests.distributed.processes import needs_gloo, run
from tests.distributed.training import STEPS, assert_same_course, assert_same_weights, make_trainer, train
from tests.model.cases import build

WORKER = Path(__file__).with_name("fsdp_worker.py")


@pytest.mark.slow
@needs_gloo
def test_two_processes_take_the_course_of_one(tmp_path: Path) -> None:
    build("six", torch.float32).save_pretrained(tmp_path / "source")
    run(WORKER, "2", tmp_path)
    trainer = make_trainer(tmp_path / "source", tmp_path / "one", sharing=1, save_strategy="no")
    expected = train(trainer)
    assert [step for step, _, _ in expected] == list(range(1, STEPS + 1))
    for rank in range(2):
        found = torch.load(tmp_path / f"found{rank}.pt")
        for name in ("sharded", "sharded, resumed", "whole", "whole, resumed"):
            assert_same_course(found[name], expected)
    assert_same_weights(tmp_path / "saved", trainer.model)
