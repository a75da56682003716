"""The processes of `test_sharded.py`: what a model that is sharded in loading computes."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig

from alibi_hf import AlibiForCausalLM
from alibi_hf.model.layers_alibi import AlibiAttention
from examples.sharding import distributed_config, save_whole
from tests.distributed.accelerated import parse, use_cpus_as_devices
from tests.distributed.processes import fork
from tests.distributed.training import make_trainer, train

PASSES = 2  # whose gradients accumulate


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that may be sharded as one tensor."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def load(job: dict[str, Any]) -> Any:
    """Return the model of a job, sharded over all processes."""
    config = DistributedConfig(**job["sizes"], fsdp_mixed_precision="mixed" in job)
    dtype = torch.float32 if "mixed" in job else torch.float64
    backend = job.get("backend", "sdpa")
    model = AlibiForCausalLM.from_pretrained(
        job["folder"], distributed_config=config, dtype=dtype, attn_implementation=backend
    )
    return model.eval()


def with_slopes_of_rank_0(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Return the logits where every process takes the slopes of the first heads."""
    right = AlibiAttention.local_distances
    AlibiAttention.local_distances = lambda self, distances, heads: distances.heads(0, heads)
    try:
        with torch.no_grad():
            return whole(model(**inputs, use_cache=False).logits)
    finally:
        AlibiAttention.local_distances = right


def compute(job: dict[str, Any]) -> dict[str, Any]:
    """Run forward, backward and generate; the batch is that of this process's data-parallel rank."""
    model = load(job)
    batch = job["batches"][dist.get_rank() // job["sizes"].get("tp_size", 1) % len(job["batches"])]
    widths: list[int] = []
    for module in model.modules():
        if isinstance(module, AlibiAttention):
            module.o_proj.register_forward_pre_hook(lambda _module, args: widths.append(args[0].shape[-1]))
    labels = batch["labels"]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits
    found = {"logits": whole(logits), "width": widths[0], "batch": batch}
    if "pp_size" not in job["sizes"]:  # Transformers' pipeline returns logits alone
        counted = (labels[:, 1:] != -100).sum()
        model.train()
        for _ in range(PASSES):
            loss = model(**batch, use_cache=False, num_items_in_batch=counted).loss  # as Trainer calls it
            loss.backward()
        found["loss"] = whole(loss)
        found["gradients"] = {name: whole(parameter.grad) / PASSES for name, parameter in model.named_parameters()}
        model.eval()
    found["written"] = whole(model.generate(**job["prompt"], **job["options"]))
    if job["sizes"].get("tp_size", 1) > 1:
        found["wrong"] = with_slopes_of_rank_0(model, inputs)
    if "save" in job:
        model.save_pretrained(job["save"])
    return found


def refusal(job: dict[str, Any]) -> str:
    """Return the message with which loading fails."""
    try:
        load(job)
    except ValueError as error:
        return str(error)
    return "loaded"


def course(job: dict[str, Any]) -> list[tuple[int, float, float]]:
    """Train after the config for tensor parallelism and FSDP, and save."""
    use_cpus_as_devices()
    os.environ.update(parse("tp_fsdp.yaml", *job["options"]))
    sizes = distributed_config(job["folder"])
    trainer = make_trainer(job["folder"], job["save"], sharing=2, distributed=sizes, save_strategy="no")
    found = train(trainer)
    save_whole(trainer)
    return found


def work(folder: Path) -> None:
    """Go through the jobs and write what this process found."""
    kinds = {"compute": compute, "refuse": refusal, "train": course}
    jobs = torch.load(folder / "jobs.pt", weights_only=False)
    found = {name: kinds[job["kind"]](job) for name, job in jobs.items()}
    torch.save(found, folder / f"found{dist.get_rank()}.pt")


if __name__ == "__main__":
    fork(int(sys.argv[1]), work, Path(sys.argv[2]))
