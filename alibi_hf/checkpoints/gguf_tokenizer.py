"""A byte-level BPE tokenizer in GGUF's words: tokens, their kinds, merges, special tokens and how text is cut first.

llama.cpp cuts text by regular expressions of its own, named by `tokenizer.ggml.pre`. The name is chosen by what
tokenizer.json says, never by the model's name: an unknown cut would give other tokens, so it is refused.

Sources: llama.cpp, `src/llama-vocab.cpp` (`llm_tokenizer_bpe`); the tokenizers library's tokenizer.json.
"""

from pathlib import Path
from typing import Any

from alibi_hf.checkpoints.json_files import read_json
from alibi_hf.errors import CheckpointFileError
from alibi_hf.model.configuration_alibi import AlibiConfig

FILE = "tokenizer.json"
_MAX_BYTES = 128 << 20  # of it; vocabularies of 250,000 tokens take 35 MB
# BLOOM's regular expression: its own file has a bracket in a bracket, which means the same.
_BLOOM = (" ?[^(\\s|[.,!?…。\uff0c、।\u06d4،])]+", " ?[^(\\s|.,!?…。\uff0c、।\u06d4،)]+")
_INSTEAD = "Without a tokenizer (--no-tokenizer, tokenizer=False) the file takes token ids only."


def has_tokenizer(folder: Path) -> bool:
    """Whether there is any tokenizer in the folder, of whatever kind."""
    return any((folder / name).is_file() for name in (FILE, "tokenizer.model", "vocab.json", "tokenizer_config.json"))


def add_tokenizer(writer: Any, folder: Path, config: AlibiConfig) -> None:
    """Write the folder's tokenizer.json into `writer` (a `gguf.GGUFWriter`), with the special tokens that files name.

    Raises:
        CheckpointFileError: where the tokenizer is none that GGUF and llama.cpp know, or is larger than the model's
            vocabulary.
    """
    import gguf

    spec = read_tokenizer(folder, config.vocab_size)
    tokens, kinds = list_tokens(spec, config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name_cut(spec))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=config.vocab_size)
    if isinstance(config.eos_token_id, list):  # a file has one
        special.special_token_ids.setdefault("eos", config.eos_token_id[0])
    special.add_special_token.setdefault("bos", False)
    special.add_special_token.setdefault("eos", False)
    special.add_to_gguf(writer, quiet=True)


def read_tokenizer(folder: Path, vocab_size: int) -> dict[str, Any]:
    """tokenizer.json, checked; `CheckpointFileError` as `add_tokenizer`."""
    if not (folder / FILE).is_file():
        raise CheckpointFileError(f"{folder} has a tokenizer, but no {FILE}, the one kind that is written. {_INSTEAD}")
    spec = read_json(folder / FILE, _MAX_BYTES)
    model, normalizer = spec.get("model") or {}, spec.get("normalizer")
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise CheckpointFileError(
            f"{folder / FILE} holds a {model.get('type')} tokenizer; only byte-level BPE is written. {_INSTEAD}"
        )
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise CheckpointFileError(
            f"{folder / FILE} has the normalizer {normalizer!r:.120}; llama.cpp would not apply it. {_INSTEAD}"
        )
    ids = _ids(spec)
    if ids and max(ids) >= vocab_size:
        raise CheckpointFileError(
            f"{folder / FILE} has a token {max(ids)}, config.json says vocab_size={vocab_size}; the tokenizer belongs "
            f"to another checkpoint. {_INSTEAD}"
        )
    name_cut(spec)
    return spec


def list_tokens(spec: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """The text of each token id and its kind in GGUF: normal, control, user-defined, or unused for a gap."""
    from gguf import TokenType

    added = {token["id"]: token for token in spec.get("added_tokens") or []}
    words = _ids(spec)
    tokens, kinds = [], []
    for number in range(vocab_size):
        tokens.append(words.get(number, f"[PAD{number}]"))
        if number in added:
            kinds.append(TokenType.CONTROL if added[number].get("special") else TokenType.USER_DEFINED)
        else:
            kinds.append(TokenType.NORMAL if number in words else TokenType.UNUSED)
    return tokens, [int(kind) for kind in kinds]


def _ids(spec: dict[str, Any]) -> dict[int, str]:
    words = {number: word for word, number in spec["model"]["vocab"].items()}
    return words | {token["id"]: token["content"] for token in spec.get("added_tokens") or []}


def name_cut(spec: dict[str, Any]) -> str:
    """llama.cpp's name of the way in which text is cut before merges; `CheckpointFileError` for an unknown one."""
    steps = _steps(spec.get("pre_tokenizer"))
    kinds = [step.get("type") for step in steps]
    if kinds and kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space", True):
        gpt2 = steps[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and gpt2:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and gpt2:
            return "refact"
        if kinds == ["Split", "ByteLevel"] and not gpt2 and _is_bloom(steps[0]):
            return "bloom"
    raise CheckpointFileError(
        f"{FILE} cuts text by {spec.get('pre_tokenizer')!r:.200}, for which llama.cpp has no name here. {_INSTEAD}"
    )


def _steps(pre: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre is None:
        return []
    return pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]


def _is_bloom(step: dict[str, Any]) -> bool:
    pattern = (step.get("pattern") or {}).get("Regex", "")
    return pattern in _BLOOM and step.get("behavior") == "Isolated" and not step.get("invert")


__all__ = ["FILE", "add_tokenizer", "has_tokenizer", "list_tokens", "name_cut", "read_tokenizer"]
