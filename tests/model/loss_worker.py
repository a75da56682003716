"""The processes of `test_loss_training.py`: one row of a batch, wrapped by DDP and by FSDP2."""

import copy
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from alibi_hf.model import loss_alibi
from tests.distributed.processes import fork
from tests.model.cases import build


def learn(model: Any, given: dict[str, Any]) -> torch.Tensor:
    """Return this rank's part of the loss after backward; gradients are averaged over the ranks, so it is doubled."""
    row = slice(dist.get_rank(), dist.get_rank() + 1)
    with patch.object(loss_alibi, "chunked_loss", wraps=loss_alibi.chunked_loss) as chunked:
        outputs = model(given["ids"][row], labels=given["labels"][row], num_items_in_batch=given["items"] / 2)
    assert outputs.logits is None and chunked.call_count == 1
    outputs.loss.backward()
    return outputs.loss.detach()


def shard(model: Any, head: bool = False) -> Any:
    """Shard each layer by itself, the head too if asked, and the rest together."""
    for part in [*model.model.layers, *([model.lm_head] if head else [])]:
        fully_shard(part)
    return fully_shard(model)


def work(folder: Path) -> None:
    """Write the mean of the losses and the gradients under each engine."""
    given, found = torch.load(folder / "given.pt"), {}
    plain = build("six", tie_word_embeddings=False).train()
    engines = {
        "FSDP2": shard(copy.deepcopy(plain)),
        "FSDP2, head apart": shard(copy.deepcopy(plain), head=True),
        "DDP": DistributedDataParallel(plain),
    }
    for engine, model in engines.items():
        loss = learn(model, given)
        dist.all_reduce(loss)
        gradients = {}
        for name, parameter in model.named_parameters():
            whole = getattr(parameter.grad, "full_tensor", lambda parameter=parameter: parameter.grad)
            gradients[name.removeprefix("module.")] = whole()
        found[engine] = {"loss": loss / 2, "gradients": gradients}
    if dist.get_rank() == 0:
        torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    fork(int(sys.argv[1]), work, Path(sys.argv[2]))
