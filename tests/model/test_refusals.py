"""What would silently change the answer is refused by name: lengths that do not fit, scaling by a padded length, ..."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import DynamicCache

from alibi_hf import AlibiConfig
from tests.model.cases import build, documents
from tests.model.feeding import flattened, pad

SCALED = {"alibi_scaling": {"type": "linear", "train_seq_len": 10}}


@pytest.mark.parametrize("length", [19, 21])
def test_position_ids_of_another_length(length: int) -> None:
    with pytest.raises(ValueError, match=rf"cover {length} tokens, the input has 20"):
        build("six")(documents(20)[0][None], position_ids=torch.arange(length)[None])


def test_a_mask_that_is_too_long() -> None:
    with pytest.raises(ValueError, match=r"covers 25 tokens.*0 \+ 20 = 20"):
        build("six")(documents(20)[0][None], attention_mask=torch.ones(1, 25))


def test_a_short_mask_in_a_compiled_model() -> None:
    model = torch.compile(build("six"), backend="eager")
    with pytest.raises(Exception, match="covers 15 tokens"):
        model(documents(20)[0][None], attention_mask=torch.ones(1, 15), use_cache=False)


@pytest.mark.parametrize("name", ["seq_idx", "cu_seq_lens_q"])
def test_documents_beside_a_cache_in_a_compiled_model(name: str) -> None:
    flat, model = flattened(documents(8, 12)), build("six")
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(Exception, match="several documents"):
        compiled(flat["input_ids"], past_key_values=DynamicCache(config=model.config), **{name: flat[name]})


def test_scaling_by_length_where_the_call_holds_more_than_one_text() -> None:
    model, texts = build("six", **SCALED), documents(20, 12)
    ids, mask = pad(texts, "left")
    flat = flattened(texts)
    packed = {name: flat[name] for name in ("input_ids", "position_ids")}
    for inputs in ({"input_ids": ids, "attention_mask": mask}, packed):
        with pytest.raises(ValueError, match="alibi_scaling"):
            model(**inputs)
    model(texts[0][None], attention_mask=torch.ones(1, 20))
    static = model.generate(texts[0][None], cache_implementation="static", max_new_tokens=3, do_sample=False)
    assert torch.equal(static, model.generate(texts[0][None], max_new_tokens=3, do_sample=False))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"alibi_rounding": "bloom", "alibi_slopes": [1.0] * 4}, "alibi_rounding"),
        ({"alibi_rounding": "falcon", "alibi_bias_max": 16}, "alibi_rounding"),
        ({"sliding_window": 4}, "sliding_window"),
        ({"clip_qkv": -3.0}, "clip_qkv"),
        ({"attn_logit_softcapping": 0.0}, "attn_logit_softcapping"),
        ({"alibi_bias_max": float("nan")}, "alibi_bias_max"),
        ({"logit_scale": float("inf")}, "logit_scale"),
        ({"hidden_dropout": 2.0}, "hidden_dropout"),
        ({"max_position_embeddings": 0}, "max_position_embeddings"),
    ],
    ids=str,
)
def test_config_values(fields: dict, words: str) -> None:
    with pytest.raises(StrictDataclassError, match=words):
        AlibiConfig(hidden_size=32, num_attention_heads=4, **fields)


def test_flash_attention_names_what_there_is() -> None:
    with pytest.raises(ValueError, match="flash_attention_2.*'sdpa'"):
        build("six").set_attn_implementation("flash_attention_2")


def test_torch_jit_trace() -> None:
    model, ids = build("six", torch.float32).requires_grad_(False), documents(20)[0][None]
    model.config.use_cache = False
    traced = torch.jit.trace(lambda tokens: model(tokens).logits, ids, check_trace=False)
    assert torch.allclose(traced(ids), model(ids).logits, atol=1e-5)
