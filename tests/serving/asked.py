"""What pipelines and continuous batching answer for saved folders; imports neither this package nor its tests.

Run as a script, `python asked.py GIVEN FOUND`, in a process in which `alibi_hf` cannot be imported.
"""

import sys
from typing import Any

if __name__ == "__main__":
    sys.modules["alibi_hf"] = None  # type: ignore[assignment]  # from here on importing it raises

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline
from transformers.generation import ContinuousBatchingConfig

LOADED = {"trust_remote_code": True, "dtype": torch.float32}
OPTIONS: dict[str, dict[str, Any]] = {
    "text-generation": {"do_sample": False, "max_new_tokens": 12, "return_tensors": True},
    "text-classification": {"top_k": None, "function_to_apply": "none"},
    "token-classification": {"ignore_labels": []},
    "feature-extraction": {},
}


def ask_pipelines(folders: dict[str, str], texts: list[str]) -> dict[str, list[Any]]:
    """Return what each task's pipeline answers to the texts: one by one, and all in one padded batch."""
    answers = {}
    for task, options in OPTIONS.items():
        pipe = pipeline(task, model=folders[task], device="cpu", **LOADED)
        if task == "text-generation":
            pipe.tokenizer.padding_side = "left"
        answers[task] = [pipe(texts, batch_size=size, **options) for size in (1, len(texts))]
    return answers


def ask_batching(folder: str, texts: list[str], backend: str) -> list[list[int]]:
    """Return what continuous batching writes after each text."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=backend, **LOADED).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    outputs = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=1),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64),
        progress_bar=False,
    )
    found = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
    return [found[tuple(prompt)] for prompt in prompts]


if __name__ == "__main__":
    given = torch.load(sys.argv[1])
    answers = ask_pipelines(given["folders"], given["texts"])
    batching = {
        name: ask_batching(given["folders"]["text-generation"], given["texts"], name) for name in ("eager", "sdpa")
    }
    assert not any(name.startswith("alibi_hf.") for name in sys.modules)
    torch.save({"pipelines": answers, "batching": batching}, sys.argv[2])
