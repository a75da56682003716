"""One rank of `test_tensor_parallel.py`, under torchrun: compares a sharded model with what one process computed."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig

from alibi_hf import AlibiForCausalLM


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that may be sharded as one tensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def main(source: Path, backend: str) -> None:
    """Load, run forward, backward and generate, and write what this rank found."""
    model = AlibiForCausalLM.from_pretrained(
        source,
        distributed_config=DistributedConfig(tp_size=dist.get_world_size() if dist.is_initialized() else 2),
        dtype=torch.float64,
        attn_implementation=backend,
    ).eval()
    given, heads = torch.load(source / "given.pt"), []
    attention = model.model.layers[0].self_attn
    attention.o_proj.register_forward_pre_hook(lambda _module, args: heads.append(args[0].shape[-1]))
    outputs = model(given["ids"], attention_mask=given["mask"], labels=given["labels"], use_cache=False)
    outputs.loss.backward()
    gradients = {name: whole(parameter.grad).clone() for name, parameter in model.named_parameters()}
    written = model.generate(given["ids"], attention_mask=given["mask"], **given["options"])
    found = {
        "logits": whole(outputs.logits).detach(),
        "loss": whole(outputs.loss).detach(),
        "gradients": gradients,
        "written": written,
        "width": heads[0],
    }
    torch.save(found, source / f"found{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
