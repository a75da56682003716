"""A model with layers on disk computes and writes what one in memory does; those layers get no gradients."""

from pathlib import Path

import torch

from alibi_hf import AlibiForCausalLM
from tests.model.cases import build, documents
from tests.model.feeding import flattened


def test_layers_on_disk(tmp_path: Path) -> None:
    model = build("twelve_grouped", torch.float32)
    model.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    offloaded = AlibiForCausalLM.from_pretrained(
        tmp_path / "model", device_map={**places, "model.layers.1": "disk"}, offload_folder=tmp_path / "disk"
    ).eval()
    assert all(parameter.is_meta for parameter in offloaded.model.layers[1].parameters())
    packed, prompt = flattened(documents(40, 23)), documents(20)[0][None]
    with torch.no_grad():
        assert torch.equal(offloaded(**packed).logits, model(**packed).logits)
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(offloaded.generate(prompt, **options), model.generate(prompt, **options))
    offloaded(**packed, labels=packed["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in offloaded.model.layers[0].parameters())
    assert all(parameter.grad is None for parameter in offloaded.model.layers[1].parameters())
