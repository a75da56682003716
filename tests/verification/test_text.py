"""The tokens a verification runs on."""

import torch

from alibi_hf.verification.text import default_text, make_tokens
from tests import builders


def test_the_shipped_text_is_there() -> None:
    assert 5000 < len(default_text().split()) < 7000
    assert default_text().isascii()


def test_without_a_tokenizer_the_ids_are_seeded(tmp_path) -> None:
    first, second = make_tokens(tmp_path, 50), make_tokens(tmp_path, 50)
    assert torch.equal(first.ids, second.ids)
    assert "no tokenizer" in first.origin
    assert int(first.ids.max()) < 50


def test_the_checkpoint_s_tokenizer_is_used(tmp_path) -> None:
    builders.tokenizer(tmp_path)
    assert make_tokens(tmp_path, builders.VOCAB, text="a b").ids.tolist() == [67, 2, 68]
    assert "Lincoln" in make_tokens(tmp_path, builders.VOCAB).origin


def test_a_tokenizer_with_too_many_entries_is_not_used(tmp_path) -> None:
    builders.tokenizer(tmp_path)
    assert "outside the 20 rows" in make_tokens(tmp_path, 20).origin


def test_rows_start_over_where_the_text_ends(tmp_path) -> None:
    builders.tokenizer(tmp_path)
    tokens = make_tokens(tmp_path, builders.VOCAB, text="abc")
    assert tokens.rows(2, 4).tolist() == [[67, 68, 69, 67], [68, 69, 67, 68]]
