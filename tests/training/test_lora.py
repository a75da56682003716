"""LoRA: the modules that are adapted by default, gradients against float64, tied weights, saving and merging."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

pytest.importorskip("peft")
from peft import AutoPeftModel, AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from peft.utils import constants

from alibi_hf import AlibiForCausalLM
from alibi_hf.adapters import register_target_modules
from tests.all_families import FAMILIES
from tests.builders import foundry, mpt
from tests.model.cases import assert_close, build, documents
from tests.model.feeding import flattened
from tests.references.decoder import decode
from tests.training.adapted import adapted, fill

TABLES = {
    name: table
    for name, table in vars(constants).items()
    if name.startswith("TRANSFORMERS_MODELS_TO_") and "llama" in table
}
SHAPES = ("six", "twelve_grouped")  # BLOOM-like with biases and a tied head; Mistral-like with grouped queries
TEXTS = documents(40, 70, 23)


def lora(**fields: Any) -> LoraConfig:
    """Return a LoRA of rank 4 on the default modules."""
    return LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **fields)


@pytest.mark.parametrize("shape", SHAPES)
def test_lora_adapts_queries_and_values_by_default(shape: str) -> None:
    model = get_peft_model(build(shape), LoraConfig())
    trained = {name.split(".lora_")[0].split(".")[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"q_proj", "v_proj"}


def test_the_defaults_of_every_method_name_modules_that_are_there() -> None:
    there = {path.rsplit(".", 1)[-1] for path, _ in build("twelve_grouped").named_modules()}
    assert len(TABLES) > 3
    for name, table in TABLES.items():
        assert set(table["alibi"]) <= there, name


def test_an_entry_that_is_there_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    table = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    monkeypatch.setitem(table, "alibi", ["o_proj"])
    register_target_modules()
    assert table["alibi"] == ["o_proj"]


def test_a_peft_that_cannot_be_imported_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft.utils", None)
    with pytest.raises(ImportError):
        importlib.import_module("peft.utils")
    register_target_modules()


def reference_gradients(model: Any, texts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the gradients of A and B by name, from the plain float64 decoder with W + (alpha / r) B A as weights.

    The loss is the mean over all predicted tokens of all texts.
    """
    state = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor.detach().double()
        for name, tensor in model.state_dict().items()
    }
    trained = {name: tensor.requires_grad_() for name, tensor in state.items() if ".lora_" in name}
    for name in trained:
        if ".lora_A." in name:
            weight = name.split(".lora_A")[0] + ".weight"
            state[weight] = state[weight] + 2.0 * trained[name.replace("lora_A", "lora_B")] @ trained[name]
    fields = model.get_base_model().config.to_dict()
    losses = [F.cross_entropy(decode(state, fields, text).logits[:-1], text[1:], reduction="sum") for text in texts]
    (sum(losses) / sum(len(text) - 1 for text in texts)).backward()
    return {name: tensor.grad for name, tensor in trained.items()}


def found_gradients(model: Any, texts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the gradients of A and B by name, the texts packed in one row; `labels=` would round to float32."""
    flat = flattened(texts)
    labels = flat["input_ids"].masked_fill(flat["position_ids"] == 0, -100)
    logits = model.train()(**flat, use_cache=False).logits
    F.cross_entropy(logits[0, :-1], labels[0, 1:]).backward()
    return {
        name.removeprefix("base_model.model."): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def compare(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor], bound: float) -> None:
    """Assert that the gradients have the same names, and each is as near to the truth as `bound` says."""
    assert found.keys() == truth.keys() and len(truth) > 0
    for name, gradient in truth.items():
        assert_close(found[name], gradient, bound)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_float64(shape: str, dtype: torch.dtype, bound: float, checkpointing: bool) -> None:
    model = adapted(shape, lora(), dtype)
    if checkpointing:
        model.enable_input_require_grads()
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": True})
    compare(found_gradients(model, TEXTS), reference_gradients(model, TEXTS), bound)


def test_the_comparison_of_gradients_sees_a_wrong_slope() -> None:
    slopes = [1.05 * slope for slope in (0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125)]
    wrong = adapted("six", lora(), alibi_slopes=slopes)
    with pytest.raises(AssertionError):
        compare(found_gradients(wrong, TEXTS), reference_gradients(adapted("six", lora()), TEXTS), 1e-4)


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"target_modules": "all-linear"}], ids=str)
def test_an_adapter_is_saved_loaded_and_merged(fields: dict[str, Any], tmp_path: Path) -> None:
    build("six", torch.float32).save_pretrained(tmp_path / "base")
    model = AlibiForCausalLM.from_pretrained(tmp_path / "base")
    before = model(TEXTS[0][None]).logits
    model = fill(get_peft_model(model, lora(**fields)))
    logits = model(TEXTS[0][None]).logits
    assert not torch.allclose(logits, before, rtol=0.01, atol=0.01)
    model.save_pretrained(tmp_path / "adapter")

    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert isinstance(loaded.get_base_model(), AlibiForCausalLM)
    assert torch.equal(loaded(TEXTS[0][None]).logits, logits)

    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    written = loaded.generate(input_ids=TEXTS[0][None], **greedy)
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AlibiForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_close(merged(TEXTS[0][None]).logits, logits, 1e-5)
    assert torch.equal(merged.generate(TEXTS[0][None], **greedy), written)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_on_an_upstream_folder_loads_where_the_base_is_given(family: str, tmp_path: Path) -> None:
    folder = FAMILIES[family](tmp_path / family)
    model = fill(get_peft_model(AlibiForCausalLM.from_pretrained(folder), lora()))
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(AlibiForCausalLM.from_pretrained(folder), tmp_path / "adapter").eval()
    assert torch.equal(loaded(TEXTS[0][None]).logits, model(TEXTS[0][None]).logits)


def test_an_adapter_on_an_upstream_folder_names_the_class_where_no_task_type_does(tmp_path: Path) -> None:
    folder = FAMILIES["bloom"](tmp_path / "bloom")
    model = fill(get_peft_model(AlibiForCausalLM.from_pretrained(folder), LoraConfig()))
    model.save_pretrained(tmp_path / "adapter")
    allowed = {"import_allowlist": ["alibi_hf.model.modeling_alibi"]}
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter", **allowed).eval()
    assert torch.equal(loaded(TEXTS[0][None]).logits, model(TEXTS[0][None]).logits)


@pytest.mark.parametrize("saved", ["embed_tokens", "lm_head"])
def test_a_trained_copy_of_a_tied_matrix_stays_tied_if_asked(saved: str, tmp_path: Path) -> None:
    model = adapted("six", lora(modules_to_save=[saved], ensure_weight_tying=True), torch.float32)
    logits = model(TEXTS[0][None]).logits
    merged = model.merge_and_unload()
    assert merged.lm_head.weight.data_ptr() == merged.model.embed_tokens.weight.data_ptr()
    merged.save_pretrained(tmp_path)
    loaded = AlibiForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.tie_word_embeddings
    assert_close(loaded(TEXTS[0][None]).logits, logits, 1e-5)


@pytest.mark.parametrize("saved", ["embed_tokens", "lm_head"])
def test_a_trained_copy_of_a_tied_matrix_is_saved_untied_otherwise(saved: str, tmp_path: Path) -> None:
    model = adapted("six", lora(modules_to_save=[saved]), torch.float32)
    logits = model(TEXTS[0][None]).logits
    copy.deepcopy(model).merge_and_unload().save_pretrained(tmp_path)
    loaded = AlibiForCausalLM.from_pretrained(tmp_path).eval()
    assert not loaded.config.tie_word_embeddings
    assert_close(loaded(TEXTS[0][None]).logits, logits, 1e-5)


@pytest.mark.parametrize("build", [mpt, foundry])
def test_an_adapter_of_an_upstream_folder_is_saved_alone(build: Callable[..., Path], tmp_path: Path) -> None:
    # PEFT reads the vocabulary of the folder's config.json with our class; the published ones hold this field
    folder = build(tmp_path / "source", raw={"norm_type": "low_precision_layernorm"})
    model = get_peft_model(AlibiForCausalLM.from_pretrained(folder), LoraConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    assert all("lora_" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
