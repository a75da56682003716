"""PEFT's other methods: what an adapted decoder computes is what the plain float64 decoder says.

Virtual tokens are tokens: they count as distance, with and without padding, in a call and in `generate`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
from peft import (
    AdaLoraConfig,
    AutoPeftModelForCausalLM,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from tests.model.cases import assert_close, build, documents
from tests.model.feeding import pad
from tests.references import decoder
from tests.training.adapted import adapted, fill

LM = {"task_type": "CAUSAL_LM"}
MERGED: dict[str, PeftConfig] = {
    "lora": LoraConfig(**LM),
    "dora": LoraConfig(use_dora=True, **LM),
    "all_linear": LoraConfig(target_modules="all-linear", **LM),
    "rank_stabilised": LoraConfig(r=4, use_rslora=True, **LM),
    "adalora": AdaLoraConfig(total_step=10, **LM),
    "ia3": IA3Config(**LM),
    "vera": VeraConfig(**LM),
    "ln_tuning": LNTuningConfig(**LM),
    "some_tokens": LoraConfig(trainable_token_indices=[3, 4], **LM),
}
VIRTUAL = 5
PROMPTS: dict[str, PeftConfig] = {
    "prompt_tuning": PromptTuningConfig(num_virtual_tokens=VIRTUAL, **LM),
    "p_tuning": PromptEncoderConfig(num_virtual_tokens=VIRTUAL, encoder_hidden_size=16, **LM),
}
PREFIX = PrefixTuningConfig(num_virtual_tokens=VIRTUAL, **LM)
SHAPES = ("six", "twelve_grouped")
TEXTS = documents(50, 31)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", MERGED)
def test_an_adapted_model_computes_what_its_merged_weights_say(method: str, shape: str) -> None:
    model = adapted(shape, copy.deepcopy(MERGED[method]))
    ids, mask = pad(TEXTS, "left")
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask).logits
        merged = copy.deepcopy(model).merge_and_unload()
    for row, text in enumerate(TEXTS):
        truth = decoder.decode(merged.state_dict(), merged.config.to_dict(), text).logits
        assert not torch.allclose(build(shape)(text[None]).logits[0], truth, rtol=0.01, atol=0.01)
        assert_close(found[row][mask[row].bool()], truth, 1e-7)  # DoRA keeps its magnitudes in float32 while merging


def prompt_truth(model: Any, text: torch.Tensor) -> torch.Tensor:
    """Return the reference's logits for `text` behind the virtual tokens: new rows of the embedding matrix."""
    base = model.get_base_model()
    state, fields = dict(base.state_dict()), base.config.to_dict()
    vocabulary = fields["vocab_size"]
    virtual = model.get_prompt(1)[0].detach()
    state["model.embed_tokens.weight"] = torch.cat([state["model.embed_tokens.weight"], virtual])
    tokens = torch.cat([torch.arange(vocabulary, vocabulary + VIRTUAL), text])
    return decoder.decode(state, fields, tokens).logits[VIRTUAL:, :vocabulary]


def prefix_truth(model: Any, text: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Return the reference's logits for `text` behind virtual keys and values, which lie nearest the first token."""
    cache = model.get_prompt(1)

    def attend(state: Any, fields: Any, name: str, x: torch.Tensor, single: bool, _: Any) -> tuple[torch.Tensor, Any]:
        layer = cache.layers[int(name.split(".")[2])]
        heads, groups, dim = fields["num_attention_heads"], fields["num_key_value_heads"], fields["head_dim"]
        q, k, v = (decoder.linear(state, f"{name}.{part}_proj", x).view(len(x), -1, dim) for part in "qkv")
        k = torch.cat([layer.keys[0].transpose(0, 1).detach(), k])
        v = torch.cat([layer.values[0].transpose(0, 1).detach(), v])
        future = torch.ones(len(x), len(k), dtype=torch.bool).triu(VIRTUAL + 1)
        ends, outputs = [len(k)] * len(k), []
        for head in range(heads):
            group = head // (heads // groups)
            scores = q[:, head] @ k[:, group].T / dim**0.5 + decoder.bias(fields, head, ends, single)[VIRTUAL:]
            outputs.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ v[:, group])
        return decoder.linear(state, f"{name}.o_proj", torch.cat(outputs, dim=-1)), None

    base = model.get_base_model()
    with monkeypatch.context() as patched:
        patched.setattr(decoder, "attend", attend)
        return decoder.decode(base.state_dict(), base.config.to_dict(), text).logits


@pytest.mark.parametrize("side", ["left", "right", "interior"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", PROMPTS)
def test_virtual_tokens_count_as_distance(method: str, shape: str, side: str) -> None:
    model = adapted(shape, copy.deepcopy(PROMPTS[method]))
    ids, mask = pad(TEXTS, side)
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask).logits[:, VIRTUAL:]
    for row, text in enumerate(TEXTS):
        assert_close(found[row][mask[row].bool()], prompt_truth(model, text), 1e-10)


@pytest.mark.parametrize("side", ["left", "right", "interior"])
@pytest.mark.parametrize("shape", SHAPES)
def test_virtual_keys_count_as_distance(shape: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(shape, copy.deepcopy(PREFIX))
    ids, mask = pad(TEXTS, side)
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask).logits
    for row, text in enumerate(TEXTS):
        assert_close(found[row][mask[row].bool()], prefix_truth(model, text, monkeypatch), 1e-10)


@pytest.mark.parametrize("method", [*PROMPTS, "prefix_tuning"])
def test_virtual_tokens_in_generation_saving_and_loading(method: str, tmp_path: Path) -> None:
    build("six", torch.float32).save_pretrained(tmp_path / "base")
    base = build("six", torch.float32)
    base.name_or_path = str(tmp_path / "base")
    model = fill(get_peft_model(base, copy.deepcopy(PROMPTS.get(method, PREFIX))))
    text = expected = TEXTS[1][None]
    with torch.no_grad():
        for _ in range(6):
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(input_ids=text, **greedy), expected)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(loaded.generate(input_ids=text, **greedy), expected)


def test_prefix_tuning_refuses_activation_checkpointing_that_would_drop_the_prefix() -> None:
    model = adapted("six", copy.deepcopy(PREFIX))
    model.get_base_model().gradient_checkpointing_enable()
    model(TEXTS[0][None])  # in eval mode nothing is checkpointed
    with pytest.raises(ValueError, match=f"past_key_values hold {VIRTUAL} tokens, which activation checkpointing"):
        model.train()(TEXTS[0][None])


class Rows(Dataset):
    """The same text, four times."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": TEXTS[0], "labels": TEXTS[0]}


def test_neftune_adds_bounded_noise_in_training_only(tmp_path: Path) -> None:
    model, alpha = build("six", torch.float32), 5.0
    before, seen = model(TEXTS[0][None]).logits, []

    def record(module: Any, args: Any) -> None:  # of the module behind the embedding
        seen.append((args[0] - model.model.embed_tokens.weight[TEXTS[0]]).abs().max().item())

    settings = TrainingArguments(
        str(tmp_path), max_steps=2, neftune_noise_alpha=alpha, learning_rate=0.0, report_to="none", save_strategy="no"
    )
    trainer = Trainer(model, settings, train_dataset=Rows())
    handle = model.model.embed_norm.register_forward_pre_hook(record)
    trainer.train()
    handle.remove()
    assert len(seen) == 2
    for noise in seen:
        bound = alpha / (len(TEXTS[0]) * model.config.hidden_size) ** 0.5
        assert 0.9 * bound < noise <= bound * (1 + 1e-4)
    assert torch.equal(model.eval()(TEXTS[0][None]).logits, before)
