"""Masks at their edges: rows with nothing to see, custom masks, masks that do not fit, and documents with a cache."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from alibi_hf.model import positions_alibi
from tests.model.cases import BACKENDS, TOLERANCE, assert_close, build, documents, expected
from tests.model.feeding import flattened

CASE = "six"


@pytest.fixture(params=BACKENDS)
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    return build(CASE, torch.float64, request.param)


@torch.no_grad()
def attention_output(model: torch.nn.Module, mask: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return what the first layer's backend gives, before the output projection, `[batch, tokens, heads * dim]`."""
    seen: list[torch.Tensor] = []
    attention = model.model.layers[0].self_attn
    hook = attention.o_proj.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    ids = documents(tokens)[0].expand(mask.shape[0], -1)
    logits = model(ids, attention_mask=mask).logits
    hook.remove()
    assert logits.isfinite().all()
    return seen[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_masked_altogether_give_zeros(model: torch.nn.Module, dtype: torch.dtype) -> None:
    model.to(dtype)
    padding = torch.ones(2, 20, dtype=torch.long)
    padding[0, :6] = 0
    found = attention_output(model, padding, 20)
    assert (found[0, :6] == 0).all()
    assert (found[0, 6:] != 0).all(-1).all()

    everything = attention_output(model, torch.zeros(2, 20, dtype=torch.long), 20)
    assert (everything == 0).all()

    causal = torch.ones(20, 20, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    causal[0, :, 4:7] = False
    low = torch.finfo(dtype).min  # what Transformers' own float masks hold, in the dtype of the model
    added = [torch.zeros(causal.shape, dtype=dtype).masked_fill(~causal, hidden) for hidden in (-torch.inf, low)]
    for mask in (causal, *added):
        found = attention_output(model, mask, 20)
        assert (found[0, 4:7] == 0).all()
        assert (found[1] != 0).all(-1).all()


def test_gradients_of_rows_masked_altogether_are_finite() -> None:
    for backend in ("eager", "sdpa"):
        model = build(CASE, torch.float32, backend)
        mask = torch.ones(2, 20, dtype=torch.long)
        mask[0, :6] = 0
        model(documents(20)[0].expand(2, -1), attention_mask=mask).logits.square().mean().backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@torch.no_grad()
def test_a_mask_of_one_head_hides_from_that_head_alone(model: torch.nn.Module) -> None:
    causal = torch.ones(20, 20, dtype=torch.bool).tril()
    mask = causal.repeat(1, 6, 1, 1)
    mask[:, 2] = torch.eye(20, dtype=torch.bool)
    width = model.config.head_dim
    found, plain = (attention_output(model, given, 20)[0].view(20, 6, width) for given in (mask, causal[None, None]))
    others = [0, 1, 3, 4, 5]
    assert_close(found[:, others], plain[:, others], 1e-10)
    assert (found[1:, 2] - plain[1:, 2]).abs().max() > 0.1


@torch.no_grad()
def test_a_float_mask_is_added_to_the_scores(model: torch.nn.Module) -> None:
    ids = documents(20)[0][None]
    added = torch.randn(1, 1, 20, 20, dtype=torch.float64)
    low = torch.full((20, 20), -torch.inf, dtype=torch.float64).triu(1)
    found = model(ids, attention_mask=added + low).logits
    truth = build(CASE, torch.float64, "eager")(ids, attention_mask=added + low).logits
    assert_close(found, truth, 1e-10)
    # A constant along the keys changes nothing, anything else does.
    constant = model(ids, attention_mask=torch.randn(1, 1, 20, 1, dtype=torch.float64) + low).logits
    assert_close(constant, expected(CASE, ids[0]).logits[None], 1e-10)
    assert (found - constant).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.int64], ids=str)
def test_the_dtype_of_a_4d_mask_need_not_be_the_models(model: torch.nn.Module, dtype: torch.dtype) -> None:
    text = documents(20)[0]
    mask = torch.ones(1, 1, 20, 20, dtype=torch.long).tril()
    if dtype != torch.int64:
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(mask == 0, -torch.inf)
    for model_dtype, bound in TOLERANCE.items():
        narrow = build(CASE, model_dtype, model.config._attn_implementation)
        assert_close(narrow(text[None], attention_mask=mask).logits[0], expected(CASE, text).logits, bound)


@torch.no_grad()
def test_a_4d_mask_with_positions_for_all_keys_counts_by_them(model: torch.nn.Module) -> None:
    text = documents(20)[0]
    gaps = torch.tensor([0, 1, 2, 9, 10, 11, 12, *range(13, 26)])  # six tokens left out, as in an edited cache
    causal = torch.ones(20, 20, dtype=torch.bool).tril()[None, None]
    by_index = model(text[None], attention_mask=causal).logits
    assert_close(by_index[0], expected(CASE, text).logits, 1e-10)
    by_position = model(text[None], attention_mask=causal, position_ids=gaps[None]).logits
    ids = torch.zeros(1, 26, dtype=torch.long)
    ids[0, gaps] = text
    wide = torch.zeros(1, 1, 26, 26, dtype=torch.bool)
    wide[0, 0, gaps[:, None], gaps[None, :]] = causal[0, 0]
    assert_close(by_position, model(ids, attention_mask=wide).logits[:, gaps], 1e-10)
    assert (by_position - by_index).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_a_4d_mask_with_a_cache(model: torch.nn.Module, static: bool) -> None:
    text = documents(30)[0]
    cache = StaticCache(config=model.config, max_cache_len=37) if static else DynamicCache(config=model.config)
    outputs = []
    for start, stop in ((0, 11), (11, 12), (12, 30)):
        keys = 37 if static else stop
        mask = torch.arange(keys) <= torch.arange(start, stop)[:, None]
        outputs.append(model(text[None, start:stop], attention_mask=mask[None, None], past_key_values=cache).logits[0])
    assert_close(torch.cat(outputs), expected(CASE, text).logits, 1e-10)


def test_a_4d_mask_of_the_wrong_shape_is_refused(model: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match=r"\(20, 20\).*\(1, 1, 20, 19\)"):
        model(documents(20)[0][None], attention_mask=torch.ones(1, 1, 20, 19, dtype=torch.bool))


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_a_mask_shorter_than_cache_and_queries_is_refused(model: torch.nn.Module, static: bool) -> None:
    ids = documents(20)[0][None]
    with pytest.raises(ValueError, match=r"covers 15 tokens.*0 \+ 20 = 20"):
        model(ids, attention_mask=torch.ones(1, 15))
    cache = StaticCache(config=model.config, max_cache_len=32) if static else DynamicCache(config=model.config)
    model(ids[:, :15], past_key_values=cache)
    with pytest.raises(ValueError, match=r"covers 5 tokens.*15 \+ 5 = 20"):
        model(ids[:, 15:], attention_mask=torch.ones(1, 5), past_key_values=cache)


def test_a_mask_of_three_dimensions_is_refused(model: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match="2 or 4 dimensions"):
        model(documents(5)[0][None], attention_mask=torch.ones(1, 5, 5))


@pytest.mark.parametrize("name", ["position_ids", "seq_idx", "cu_seq_lens_q"])
def test_several_documents_with_a_cache_are_refused(model: torch.nn.Module, name: str) -> None:
    flat = flattened(documents(8, 12))
    with pytest.raises(ValueError, match="several documents"):
        model(flat["input_ids"], past_key_values=DynamicCache(config=model.config), **{name: flat[name]})


@torch.no_grad()
def test_one_document_given_as_packed_keeps_its_cache(model: torch.nn.Module) -> None:
    flat = flattened(documents(20))
    outputs = model(flat["input_ids"], position_ids=flat["position_ids"], use_cache=True)
    assert outputs.past_key_values.get_seq_length() == 20


@torch.no_grad()
def test_steps_of_zero_and_jumps_start_documents(model: torch.nn.Module) -> None:
    first, second, third = texts = documents(6, 9, 5)
    positions = torch.cat([torch.arange(3, 9), torch.arange(8, 17), torch.arange(40, 45)])[None]  # 8 to 8, 16 to 40
    logits = model(torch.cat(texts)[None], position_ids=positions).logits[0].split([6, 9, 5])
    for text, found in zip((first, second, third), logits, strict=True):
        assert_close(found, expected(CASE, text).logits, 1e-10)


def test_documents_are_told_from_padding_by_the_mask() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 1, 1]])
    for positions in ([0, 0, 0, 1, 2, 2, 3, 4], [1, 1, 0, 1, 2, 1, 3, 4], list(range(8))):
        assert not positions_alibi.document_starts(torch.tensor([positions]), mask).any()
    starts = positions_alibi.document_starts(torch.tensor([[0, 0, 0, 1, 2, 0, 0, 1]]), mask)
    assert starts.int().tolist() == [[0, 0, 0, 0, 0, 0, 1, 0]]
