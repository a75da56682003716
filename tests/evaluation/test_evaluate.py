"""`evaluate` against a direct computation in float64, and what it says of models that fail."""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from alibi_hf import AlibiError, AlibiForCausalLM, evaluate
from alibi_hf.evaluation import Evaluation, Reading, read_lengths, reading
from alibi_hf.evaluation.text import Tokens
from alibi_hf.evaluation.windows import Region
from tests import builders
from tests.builders import VOCAB, fill
from tests.model.cases import build, documents, expected

WORDS = "Fellow citizens of the Senate, and of the House: in obedience to the law I lay before you 42 reports. "
TEXT = "".join(WORDS[number % 7 :] for number in range(7))  # 698 characters, as many tokens
LENGTHS = [16, 50, 128]
NARROW = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None}


def gpt2(folder: Path) -> Path:
    config = GPT2Config(n_positions=64, n_embd=16, n_layer=1, n_head=2, **NARROW)
    fill(GPT2LMHeadModel(config)).save_pretrained(folder)
    return folder


def llama(folder: Path) -> Path:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=1, **NARROW
    )
    fill(LlamaForCausalLM(config)).save_pretrained(folder)
    return folder


BUILDERS: dict[str, Callable[[Path], Path]] = {
    "bloom": builders.bloom,
    "mpt": builders.mpt,
    "gpt2": gpt2,
    "llama": llama,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each kind with a tokenizer of one token a character, and the text."""
    root = tmp_path_factory.mktemp("models")
    found = {name: builders.tokenizer(build(root / name)) for name, build in BUILDERS.items()}
    (root / "text.txt").write_text(TEXT)
    AlibiForCausalLM.from_pretrained(found["bloom"]).save_pretrained(root / "own")
    return {**found, "own": builders.tokenizer(root / "own"), "text": root / "text.txt"}


def ids_of_the_text() -> torch.Tensor:
    return torch.tensor([ord(character) - 32 + 2 for character in TEXT])


def by_hand(logits_of: Callable[[torch.Tensor], torch.Tensor], protocol: str, length: int, longest: int) -> list:
    """Loss of each predicted token, as (window, position in it, loss), from the definition, token by token."""
    ids = ids_of_the_text()
    stop, found = len(ids) // longest * longest, []
    if protocol == "non-overlapping":
        spans = [(start, start + length, 1) for start in range(0, stop - length + 1, length)]
    else:
        spans, step, at = [], length // 2, longest - longest // 2
        while at < stop:
            end = min(at + step, stop)
            spans.append((end - length, end, length - (end - at)))
            at = end
    for number, (start, end, first) in enumerate(spans):
        losses = -logits_of(ids[start:end]).double().log_softmax(-1)
        found += [(number, at, losses[at - 1, ids[start + at]].item()) for at in range(first, length)]
    return found


def check(found: Reading, truth: list, bound: float) -> None:
    """Assert that a reading has the mean, the standard error and the spans of the losses."""
    losses = [loss for _, _, loss in truth]
    assert (found.tokens, found.windows) == (len(truth), truth[-1][0] + 1)
    assert found.loss == pytest.approx(sum(losses) / len(losses), rel=bound)
    assert found.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=3 * bound)
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2), rel=1e-9)  # one byte a token here
    if found.protocol == "non-overlapping":
        windows = torch.tensor(losses, dtype=torch.float64).view(found.windows, -1).mean(1)
        expected_error = (windows.std() / len(windows) ** 0.5).item() if len(windows) > 1 else None
        assert found.standard_error == pytest.approx(expected_error, rel=1e-3)
        assert [span.start for span in found.spans] == [2**n for n in range(math.ceil(math.log2(found.length)))]
        assert found.spans[-1].stop == found.length
        for span in found.spans:
            inside = [loss for _, position, loss in truth if span.start <= position < span.stop]
            assert span.tokens == len(inside)
            assert span.loss == pytest.approx(sum(inside) / len(inside), rel=bound)
    else:
        assert found.spans == []


@pytest.mark.parametrize(("batch", "names"), [(1, ["own"]), (8192, ["own", "bloom", "mpt", "gpt2", "llama"])])
def test_every_class_of_model_reads_as_the_definition_says(
    folders: dict[str, Path], batch: int, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "BATCH_TOKENS", batch)
    lengths = [16, 50]
    found = evaluate([folders[name] for name in names], folders["text"], lengths, dtype="float64")
    upstream = AutoModelForCausalLM.from_pretrained
    for name, result in zip(names, found.models, strict=True):
        load = AlibiForCausalLM.from_pretrained if name in ("own", "bloom", "mpt") else upstream
        model = load(folders[name], dtype=torch.float64)
        assert result.model_class == type(model).__name__
        with torch.no_grad():
            for each in result.readings:
                truth = by_hand(lambda ids, m=model: m(ids[None]).logits[0], each.protocol, each.length, 50)
                check(each, truth, 1e-9)
        assert [(each.length, each.protocol) for each in result.readings] == [
            (length, protocol) for length in lengths for protocol in ("non-overlapping", "sliding")
        ]


@pytest.mark.parametrize("wrong", [None, {"alibi": False}, {"alibi_bias_max": 5}, {"sign": -1}, {"past": 32}])
def test_ours_is_that_of_the_reference_past_the_training_length(wrong: dict[str, Any] | None) -> None:
    ids, lengths = documents(400)[0], [20, 100]
    changes = wrong if wrong and "alibi" in str(wrong) else {}
    model = build("six", backend="eager", attention_window=False, **changes)
    if wrong == {"sign": -1}:
        model.config.alibi_slopes = [-(2 ** (-8 * head / 8)) for head in range(1, 7)]  # the config would refuse these
    if wrong == {"past": 32}:  # wrong only past the training length
        forward = model.model.forward

        def cut(input_ids: torch.Tensor, **options: Any) -> Any:
            found = forward(input_ids=input_ids, **options)
            found.last_hidden_state[:, 32:] = forward(input_ids=input_ids[:, 32:], **options).last_hidden_state
            return found

        model.model.forward = cut
    for each in read_lengths(model, ids, lengths):
        losses = []
        step = each.length if each.protocol == "non-overlapping" else each.length // 2
        stops = range(each.length, 401, step) if each.protocol == "non-overlapping" else range(50 + step, 401, step)
        for stop in stops:
            window = ids[stop - each.length : stop]
            logits = expected("six", window).logits.double().log_softmax(-1)
            first = 1 if each.protocol == "non-overlapping" else each.length - step
            losses += [-logits[at - 1, window[at]].item() for at in range(first, each.length)]
        right = each.loss == pytest.approx(sum(losses) / len(losses), rel=1e-7) and each.tokens == len(losses)
        if wrong is None:
            assert right, each
        elif each.length > 32 or "past" not in wrong:
            assert not right, (wrong, each)


def test_upstreams_class_and_ours_agree_where_both_can_read(folders: dict[str, Path]) -> None:
    models = [folders["bloom"], f"upstream:{folders['bloom']}", f"upstream:{folders['mpt']}", folders["mpt"]]
    found = evaluate(models, folders["text"], LENGTHS, dtype="float64").models
    assert [model.name for model in found] == ["bloom", "bloom (upstream)", "mpt (upstream)", "mpt"]
    assert [model.model_class for model in found] == [
        "AlibiForCausalLM", "BloomForCausalLM", "MptForCausalLM", "AlibiForCausalLM",
    ]  # fmt: skip
    assert [model.positions for model in found] == ["ALiBi"] * 4
    for ours, theirs in ((found[0], found[1]), (found[3], found[2])):
        for own, other in zip(ours.readings, theirs.readings, strict=True):
            if other.failure:
                assert (theirs.name, other.length) == ("mpt (upstream)", 128)
                assert other.loss is None and "must match the size" in other.failure
            else:
                assert own.loss == pytest.approx(other.loss, rel=1e-5)  # upstream rounds slopes and softmax to float32
    assert not any(each.failure for each in found[0].readings + found[1].readings + found[3].readings)


def test_models_that_fail_say_why_and_the_others_are_read(folders: dict[str, Path]) -> None:
    found = evaluate([folders["gpt2"], folders["llama"]], folders["text"], LENGTHS, dtype="float64")
    gpt2, llama = found.models
    assert (gpt2.positions, gpt2.trained_length) == ("learned (64 rows)", 64)
    assert llama.positions == "RoPE (theta 10000)"
    failed = {each.length: each.failure for each in gpt2.readings if each.failure}
    assert failed.keys() == {128} and "64 rows" in failed[128]
    assert not any(each.failure for each in llama.readings)


def test_a_loss_that_is_not_finite_is_said_with_its_place(folders: dict[str, Path], tmp_path: Path) -> None:
    model = AlibiForCausalLM.from_pretrained(folders["bloom"])
    token = "4"  # the 2 reports: first seen at character 85
    with torch.no_grad():
        model.model.embed_tokens.weight[ord(token) - 30] = math.nan
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.nan_to_num())
    model.save_pretrained(tmp_path / "nan")
    builders.tokenizer(tmp_path / "nan")
    readings = evaluate(tmp_path / "nan", folders["text"], [16, 50]).models[0].readings
    at = TEXT.index(token)  # attention multiplies what it masks by zero, which leaves NaN: all of the window is lost
    assert readings[0].failure == f"loss is not finite from position 1 of window {at // 16}"
    assert readings[0].loss is readings[0].perplexity is readings[0].standard_error is None
    assert readings[2].failure == f"loss is not finite from position 1 of window {at // 50}"


@pytest.mark.parametrize("batch", [1, 64, 8192])
def test_the_place_is_counted_in_windows_and_their_tokens(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BATCH_TOKENS", batch)
    ids = torch.arange(200, dtype=torch.int32)

    class Reader:
        """Gives each token its number as its loss, and the tokens from 75 to 77 none."""

        model = torch.nn.Embedding(1, 1)
        model.device = torch.device("cpu")

        def losses(self, windows: torch.Tensor, first: int) -> torch.Tensor:
            found = windows[:, first:].float()
            return found.where((found < 75) | (found > 77), math.inf)

    def failure(protocol: Any) -> str:
        region = Region(first=50, stop=200)
        return reading.read(Reader(), Tokens(ids, ids), 20, protocol, region).failure  # type: ignore[arg-type]

    assert failure("non-overlapping") == "loss is not finite from position 15 of window 3"
    assert failure("sliding") == "loss is not finite from position 15 of window 2"  # of 60 to 79, from 70 on


def test_what_the_report_says(folders: dict[str, Path], tmp_path: Path) -> None:
    found = evaluate(folders["bloom"], folders["text"], [16, 10**6, 50, 16], output=tmp_path / "out", max_tokens=600)
    assert found.lengths == [16, 50, 10**6]
    model = found.models[0]
    assert {each.length for each in model.readings} == {16, 50} and model.tokens == 600
    assert "1,000,000 left out" in model.notes[0] and "600 tokens" in model.notes[0]
    assert "tokens 0 to 599" in model.notes[1] and "from 25 on" in model.notes[1]
    assert (model.dtype, model.device, model.vocabulary) == ("float32", "cpu", VOCAB)
    assert all(each.seconds > 0 and each.peak_bytes for each in model.readings)
    assert found.text == [
        {
            "name": "text.txt",
            "sha256": hashlib.sha256(TEXT.encode()).hexdigest(),
            "bytes": len(TEXT),
            "characters": len(TEXT),
        }
    ]
    saved = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert Evaluation.from_dict(saved) == found
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(AlibiError, match="schema_version 0"):
        Evaluation.from_dict({**saved, "schema_version": 0})


def test_a_fixed_stride_and_one_window(folders: dict[str, Path]) -> None:
    found = evaluate(folders["bloom"], folders["text"], [16, 600], stride=5, dtype="float64").models[0].readings
    assert [each.stride for each in found] == [16, 5, 600, 5]
    assert found[1].tokens == found[3].tokens == 5 and found[2].windows == found[3].windows == 1
    assert found[2].standard_error is None and found[2].tokens == 599


def test_a_loaded_model_is_left_as_it_was() -> None:
    model = build("six", hidden_dropout=0.5).train()
    model.model.layers[0].eval()  # as a part that is frozen
    modes = [module.training for module in model.modules()]
    text = documents(200)[0]
    found = read_lengths(model, text, [90, 20])
    assert [module.training for module in model.modules()] == modes and [each.length for each in found] == [
        20,
        20,
        90,
        90,
    ]
    assert read_lengths(model, text, [90, 20])[0].loss == found[0].loss  # without dropout
    for lengths, stride, says in (
        ([1, 20], None, "nothing to predict"),
        ([20], 20, "stride of 20"),
        ([300], None, "200 tokens"),
    ):
        with pytest.raises(AlibiError, match=says):
            read_lengths(model, text, lengths, stride)
