"""Runs a folder's own code in a process where this package cannot be found, and says what the model computed.

`python running.py JOB`, where JOB is a JSON file, loads the folder with `trust_remote_code`; `compute` is also what the
installed package's model is run with, so that both are fed alike. Imports torch, transformers and safetensors only.
"""

import json
import sys
from pathlib import Path
from typing import Any

SEED = 20211
SAMPLE = "The quick brown fox jumps over 13 lazy dogs; déjà vu."


class Hidden:
    """Refuses the package by name, wherever it is installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Raise ImportError for the package and what is in it."""
        if name.partition(".")[0] == "alibi_hf":
            raise ImportError("alibi_hf is hidden: a folder must load without it")


def compute(model: Any, length: int, longest: int) -> dict[str, Any]:
    """What a model gives for fixed ids: output of its head, padded, packed, cached decoding, eager, and a long row.

    Args:
        model: any of the heads, or the decoder alone.
        length: tokens of the other rows.
        longest: tokens of the long row; 0 for none.

    Returns:
        Tensors by name, in the dtype of the model.
    """
    import torch

    model = model.eval()
    # Heads reduce; logits or hidden states at every position show more.
    decoder = model if hasattr(model, "lm_head") else getattr(model, model.base_model_prefix, model)
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(0, model.config.vocab_size, (2, max(length, longest)), generator=generator)
    row, mask, short = ids[:, :length], torch.ones(2, length, dtype=torch.long), length // 5
    mask[1, :short] = 0
    packed = torch.cat((torch.arange(length - short), torch.arange(short)))[None]
    with torch.no_grad():
        head = model(row[:1], use_cache=False).to_tuple()
        found = {f"output {number}": value for number, value in enumerate(head) if isinstance(value, torch.Tensor)}
        found["padded"] = decoder(row, attention_mask=mask, use_cache=False)[0]
        found["packed"] = decoder(row[:1], position_ids=packed, use_cache=False)[0]
        found["decoded"] = _decode(decoder, row, mask, short)
        if longest:
            found["long"] = decoder(ids[:1, :longest], use_cache=False)[0]
        usual = model.config._attn_implementation
        model.set_attn_implementation("eager")
        found["eager"] = decoder(row, attention_mask=mask, use_cache=False)[0]
        model.set_attn_implementation(usual)
    return {name: value.contiguous().clone() for name, value in found.items()}


def _decode(decoder: Any, row: Any, mask: Any, steps: int) -> Any:
    """The last position of each of the cached steps that follow a prefill, [batch, steps, width]."""
    import torch

    prefill = row.shape[1] - steps
    done = decoder(row[:, :prefill], attention_mask=mask[:, :prefill], use_cache=True)
    found = []
    for end in range(prefill + 1, row.shape[1] + 1):
        last = {"past_key_values": done.past_key_values, "use_cache": True}
        done = decoder(row[:, end - 1 : end], attention_mask=mask[:, :end], **last)
        found.append(done[0][:, -1])
    return torch.stack(found, dim=1)


def main(job: dict[str, Any]) -> None:
    """Load, compute and save; an error ends the process, and its last line says what was wrong."""
    import torch
    import transformers
    from safetensors.torch import save_file

    torch.set_num_threads(job["threads"])
    folder, auto = job["folder"], job["auto_class"]
    kind = getattr(transformers, auto)
    model, info = kind.from_pretrained(folder, trust_remote_code=True, dtype="auto", output_loading_info=True)
    if not type(model).__module__.startswith("transformers_modules"):
        raise RuntimeError(f"{auto} gave {type(model)}, which is none of the folder's own code")
    if unread := sorted(info["unexpected_keys"]):
        raise RuntimeError(f"nothing reads the tensor {unread[0]} ({len(unread)} such tensors)")
    save_file(compute(model, *job["lengths"]), job["output"])
    config = model.config
    del model
    for other in job["auto_classes"]:
        with torch.device("meta"):
            getattr(transformers, other).from_config(config, trust_remote_code=True)
    if job["tokenizer"]:
        ids = transformers.AutoTokenizer.from_pretrained(folder)(SAMPLE)["input_ids"]
        if max(ids) >= config.vocab_size:
            raise RuntimeError(f"the tokenizer gives id {max(ids)}, the model has {config.vocab_size} embeddings")


if __name__ == "__main__":
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]
    sys.meta_path.insert(0, Hidden())  # type: ignore[arg-type]
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
