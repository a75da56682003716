"""The processes of `test_fsdp.py`: Trainer with the FSDP2 config of `examples/accelerate/`."""

import os
import sys
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from alibi_hf.model import loss_alibi
from examples.sharding import save_whole
from tests.distributed.accelerated import parse, use_cpus_as_devices
from tests.distributed.processes import fork
from tests.distributed.training import make_trainer, train


def work(folder: Path) -> None:
    """Train in each way and write the course of each run."""
    source, found = folder / "source", {}
    trainer = make_trainer(source, folder / "sharded")
    with patch.object(loss_alibi, "chunked_loss", wraps=loss_alibi.chunked_loss) as chunked:
        found["sharded"] = train(trainer)
    assert chunked.called  # no logits, though the head's weight is gathered around its forward
    assert isinstance(trainer.model, FSDPModule) and isinstance(trainer.model.model.layers[0], FSDPModule)
    save_whole(trainer, output_dir=str(folder / "saved"))
    found["sharded, resumed"] = train(make_trainer(source, folder / "sharded"), folder / "sharded" / "checkpoint-2")

    os.environ["FSDP_STATE_DICT_TYPE"] = "FULL_STATE_DICT"
    os.environ["FSDP_ACTIVATION_CHECKPOINTING"] = "false"
    found["whole"] = train(make_trainer(source, folder / "whole"))
    found["whole, resumed"] = train(make_trainer(source, folder / "whole"), folder / "whole" / "checkpoint-2")
    torch.save(found, folder / f"found{dist.get_rank()}.pt")


if __name__ == "__main__":
    os.environ.update(parse("fsdp2_8_gpus.yaml", "--num_processes", sys.argv[1], "--mixed_precision", "no"))
    use_cpus_as_devices()
    fork(int(sys.argv[1]), work, Path(sys.argv[2]))
