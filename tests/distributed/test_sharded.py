"""Models that Transformers shards in loading compute on CPU what one process does.

Tensor parallel: each process holds some of the heads, and slopes follow the head's place in the whole model, also where
FSDP shards the same model over further processes. Pipeline: each process holds some of the layers.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.distributed import DistributedConfig

from alibi_hf import AlibiForCausalLM
from examples.sharding import untie
from tests.builders import bloom
from tests.distributed.processes import needs_gloo, run
from tests.distributed.training import assert_same_course, assert_same_weights, make_trainer, train
from tests.model.cases import assert_close, build, documents
from tests.model.feeding import flattened, pad
from tests.references import step1

WORKER = Path(__file__).with_name("sharded_worker.py")
OPTIONS = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
MESHES = "dp_replicate_size" in {field.name for field in dataclasses.fields(DistributedConfig)}  # Transformers 5.2x

TENSOR_PARALLEL, PIPELINE, FSDP = {"tp_size": 2}, {"pp_size": 2}, {"fsdp_size": 2}
JOBS = {
    "heads": ("six", TENSOR_PARALLEL, "sdpa", "padded"),
    "heads in eager": ("six", TENSOR_PARALLEL, "eager", "padded"),
    "grouped heads": ("twelve_grouped", TENSOR_PARALLEL, "sdpa", "packed"),
    "stages": ("six", PIPELINE, "sdpa", "padded"),  # with a norm on the embeddings
    "stages of a scaled embedding": ("capped", PIPELINE, "eager", "packed"),
    "rotated heads": ("hybrid", TENSOR_PARALLEL, "sdpa", "packed"),
    "normed heads": ("rms_head_norm", TENSOR_PARALLEL, "sdpa", "padded"),
    "heads with a layer norm": ("capped", TENSOR_PARALLEL, "eager", "packed"),
    "stages with a table of positions": ("learned", PIPELINE, "sdpa", "padded"),
    "weights": ("six", FSDP, "sdpa", "packed"),
}


def batches_of(kind: str, count: int) -> list[dict[str, torch.Tensor]]:
    """Return one batch a data-parallel rank, each of as many predicted tokens."""
    batches = []
    for index in range(count):
        texts = [text.roll(index) for text in documents(40, 23)]
        if kind == "packed":
            flat = flattened(texts)
            batches.append({**flat, "labels": flat["input_ids"].masked_fill(flat["position_ids"] == 0, -100)})
        else:
            ids, mask = pad(texts, "left")
            batches.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return batches


def make_job(folder: Path, case: str, sizes: dict[str, int], backend: str, kind: str) -> dict[str, Any]:
    """Save the model of a case and say what is to be done with it."""
    build(case, torch.float64, backend, vocab_size=62).save_pretrained(folder)  # even, for Transformers before 5.23
    ids, mask = pad(documents(20, 33), "left")
    return {
        "kind": "compute",
        "folder": folder,
        "sizes": sizes,
        "backend": backend,
        "batches": batches_of(kind, sizes.get("fsdp_size", 1)),
        "prompt": {"input_ids": ids, "attention_mask": mask},
        "options": OPTIONS,
    }


def launch(folder: Path, jobs: dict[str, Any], processes: int) -> list[dict[str, Any]]:
    """Return what each process found, by job."""
    torch.save(jobs, folder / "jobs.pt")
    run(WORKER, str(processes), folder)
    return [torch.load(folder / f"found{rank}.pt") for rank in range(processes)]


def check(job: dict[str, Any], found: dict[str, Any]) -> None:
    """Assert that one process of a job found what one process alone finds."""
    model = AlibiForCausalLM.from_pretrained(
        job["folder"], dtype=torch.float64, attn_implementation=job["backend"]
    ).eval()
    size = job["sizes"].get("tp_size", 1)
    assert found["width"] == model.config.num_attention_heads * model.config.head_dim // size
    outputs = model(**found["batch"], use_cache=False)
    counts = found["batch"].get("attention_mask", torch.ones_like(found["batch"]["input_ids"])).bool()
    assert_close(found["logits"][counts], outputs.logits[counts], 1e-10)
    assert torch.equal(found["written"], model.generate(**job["prompt"], **OPTIONS))
    if size > 1:  # this comparison does notice slopes of other heads
        with pytest.raises(AssertionError, match="error"):
            assert_close(found["wrong"][counts], outputs.logits[counts], 1e-3)
    if "pp_size" in job["sizes"]:
        return
    torch.testing.assert_close(found["loss"].float(), outputs.loss.detach(), rtol=1e-6, atol=0)
    loss = sum(model(**batch, use_cache=False).loss for batch in job["batches"]) / len(job["batches"])
    loss.backward()
    for name, parameter in model.named_parameters():
        if not name.endswith("k_proj.bias"):  # zero but for rounding
            assert_close(found["gradients"][name], parameter.grad, 1e-5)


def check_mixed(job: dict[str, Any], found: dict[str, Any]) -> None:
    """Assert that FSDP's bfloat16 is that of a bfloat16 model: it casts neither slopes nor angles."""
    model = AlibiForCausalLM.from_pretrained(job["folder"], dtype=torch.bfloat16).eval()
    inputs = {name: value for name, value in found["batch"].items() if name != "labels"}
    assert found["logits"].dtype == torch.bfloat16
    assert torch.equal(found["logits"], model(**inputs, use_cache=False).logits)


@pytest.mark.slow
@needs_gloo
def test_two_processes(tmp_path: Path) -> None:
    jobs = {name: make_job(tmp_path / name, *job) for name, job in JOBS.items()}
    refused = {
        "heads that do not divide": {"num_attention_heads": 3, "hidden_size": 24},
        "one key/value head": {"num_key_value_heads": 1},
        "a norm over all heads": {"qk_norm": "full"},
    }
    for name, fields in refused.items():
        build("six", **fields).save_pretrained(tmp_path / name)
        jobs[name] = {"kind": "refuse", "folder": tmp_path / name, "sizes": TENSOR_PARALLEL}
    jobs["upstream, fused"] = {"kind": "refuse", "folder": bloom(tmp_path / "bloom"), "sizes": FSDP}
    jobs["upstream, renamed"] = make_job(tmp_path / "unused", *JOBS["weights"])
    jobs["upstream, renamed"]["folder"] = step1.write(tmp_path / "step1", groups=2)
    for name, case in {"mixed": "own_slopes", "mixed, rotated": "rope"}.items():
        jobs[name] = make_job(tmp_path / name, case, FSDP, "sdpa", "packed") | {"mixed": True}
    for found in launch(tmp_path, jobs, 2):
        for name in ("mixed", "mixed, rotated"):
            check_mixed(jobs[name], found.pop(name))
        assert "tp_size=2 does not divide num_attention_heads=3" in found.pop("heads that do not divide")
        assert "num_key_value_heads=1" in found.pop("one key/value head")
        assert "qk_norm='full'" in found.pop("a norm over all heads")
        assert "Convert it first" in found.pop("upstream, fused")
        for name in found:
            check(jobs[name], found[name])


@pytest.mark.slow
@needs_gloo
@pytest.mark.skipif(not MESHES, reason="this version of Transformers shards in one way at a time")
def test_four_processes_in_a_mesh(tmp_path: Path) -> None:
    mesh = make_job(tmp_path / "mesh", "twelve_grouped", TENSOR_PARALLEL | FSDP, "sdpa", "packed")
    build("six", torch.float32, vocab_size=62).save_pretrained(tmp_path / "tied")
    untie(tmp_path / "tied", tmp_path / "source")
    options = ("--num_processes", "4", "--num_machines", "1", "--mixed_precision", "no")
    options += ("--parallelism_config_tp_size", "2")
    training = {"kind": "train", "folder": tmp_path / "source", "options": options, "save": tmp_path / "saved"}
    every = launch(tmp_path, {"mesh": mesh, "training": training}, 4)
    trainer = make_trainer(tmp_path / "source", tmp_path / "one", sharing=1, save_strategy="no")
    expected = train(trainer)
    for found in every:
        check(mesh, found["mesh"])
        assert_same_course(found["training"], expected)
    assert_same_weights(tmp_path / "saved", trainer.model)
