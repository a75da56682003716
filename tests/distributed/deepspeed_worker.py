"""The processes of `test_deepspeed.py`: Trainer with ZeRO-3, gloo and torch's own AdamW."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.distributed.processes import fork
from tests.distributed.training import make_trainer, train

ZERO3 = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,  # shard small tensors too
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}


def work(folder: Path) -> None:
    source = folder / "source"
    trainer = make_trainer(source, folder / "zero3", deepspeed=ZERO3)
    found = {"zero3": train(trainer)}
    trainer.save_model(str(folder / "saved"))
    found["resumed"] = train(make_trainer(source, folder / "zero3", deepspeed=ZERO3), folder / "zero3" / "checkpoint-2")
    torch.save(found, folder / f"found{dist.get_rank()}.pt")


if __name__ == "__main__":
    os.environ["DS_ACCELERATOR"] = "cpu"
    fork(int(sys.argv[1]), work, Path(sys.argv[2]))
