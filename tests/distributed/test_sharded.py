"""Two processes on CPU with half of the heads each compute what one process does: slopes follow the global head."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed

from tests.model.cases import assert_close, build, documents
from tests.model.feeding import pad

WORKER = Path(__file__).with_name("tensor_parallel_worker.py")
OPTIONS = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize(("case", "backend"), [("six", "eager"), ("six", "sdpa"), ("twelve_grouped", "sdpa")])
def test_two_processes_compute_what_one_does(case: str, backend: str, tmp_path: Path) -> None:
    model = build(case, torch.float64, backend, vocab_size=62)  # before Transformers 5.23 it had to be even
    model.save_pretrained(tmp_path)
    ids, mask = pad(documents(40, 23), "left")
    labels = ids.masked_fill(mask == 0, -100)
    torch.save({"ids": ids, "mask": mask, "labels": labels, "options": OPTIONS}, tmp_path / "given.pt")
    outputs = model(ids, attention_mask=mask, labels=labels, use_cache=False)
    outputs.loss.backward()
    written = model.generate(ids, attention_mask=mask, **OPTIONS)

    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launch, WORKER, tmp_path, backend], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        found = torch.load(tmp_path / f"found{rank}.pt")
        assert found["width"] == model.config.num_attention_heads * model.config.head_dim // 2
        counts = mask.bool()
        assert_close(found["logits"][counts], outputs.logits[counts], 1e-10)
        torch.testing.assert_close(found["loss"], outputs.loss.detach(), rtol=1e-6, atol=0)  # a float32 loss
        assert torch.equal(found["written"], written)
        for name, parameter in model.named_parameters():
            if not name.endswith("k_proj.bias"):  # zero but for rounding
                assert_close(found["gradients"][name], parameter.grad, 1e-5)
