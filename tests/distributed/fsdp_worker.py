"""The processes of `test_fsdp.py`: Trainer with the FSDP2 config of `examples/accelerate/`."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.distributed.accelerated import allow_fsdp_on_cpu, parse
from tests.distributed.processes import fork
from tests.distributed.training import make_trainer, train


def work(folder: Path) -> None:
    """Train in each way and write the course of each run."""
    source, found = folder / "source", {}
    trainer = make_trainer(source, folder / "sharded")
    found["sharded"] = train(trainer)
    assert type(trainer.model).__name__ == "FSDPAlibiForCausalLM"
    assert type(trainer.model.model.layers[0]).__name__ == "FSDPAlibiDecoderLayer"
    trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")  # else save_model writes nothing
    trainer.save_model(str(folder / "saved"))
    found["sharded, resumed"] = train(make_trainer(source, folder / "sharded"), folder / "sharded" / "checkpoint-2")

    os.environ["FSDP_STATE_DICT_TYPE"] = "FULL_STATE_DICT"
    os.environ["FSDP_ACTIVATION_CHECKPOINTING"] = "true"
    found["whole"] = train(make_trainer(source, folder / "whole"))
    found["whole, resumed"] = train(make_trainer(source, folder / "whole"), folder / "whole" / "checkpoint-2")
    torch.save(found, folder / f"found{dist.get_rank()}.pt")


if __name__ == "__main__":
    os.environ.update(parse("fsdp2_8_gpus.yaml", "--num_processes", sys.argv[1], "--mixed_precision", "no"))
    allow_fsdp_on_cpu()
    fork(int(sys.argv[1]), work, Path(sys.argv[2]))
