"""The files that travel beside the weights: model code, tokenizer, generation config and the card."""

import json
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from yaml import YAMLError  # type: ignore[import-untyped]

from alibi_hf.checkpoints.carried import copy_carried, require_inside
from alibi_hf.checkpoints.conversion import FILE as CONVERSION
from alibi_hf.checkpoints.conversion import Conversion
from alibi_hf.checkpoints.shards import read_json
from alibi_hf.checkpoints.source import Checkpoint
from alibi_hf.checkpoints.writer import write_json
from alibi_hf.families._fields import GENERATION_FIELDS
from alibi_hf.model import modeling_alibi

CARD = "README.md"
# Of the source's card only these are carried over; nothing is guessed.
_CARD_FIELDS = ("license", "license_name", "license_link", "language", "datasets")
_VERDICTS = {
    True: "**Verified**: `verification.md` shows how near it is to upstream.",
    False: "**Not verified**: the verification failed; see `verification.md` before using this checkpoint.",
    None: "**Not verified**: no verification was run.",
}


def write_companions(checkpoint: Checkpoint, folder: Path) -> None:
    """Model code, tokenizer, chat template, licence files and generation config into `folder`."""
    for path in sorted(Path(modeling_alibi.__file__).parent.glob("*_alibi.py")):
        shutil.copyfile(path, folder / path.name)
    copy_carried(checkpoint.path, checkpoint.carried_files(), folder)
    _name_tokenizer_class(checkpoint, folder)
    write_json(folder / "generation_config.json", generation_config(checkpoint))


def _name_tokenizer_class(checkpoint: Checkpoint, folder: Path) -> None:
    """AutoTokenizer finds the class by the model_type where tokenizer_config.json does not name it; ours is new."""
    path = folder / "tokenizer_config.json"
    if not path.exists() and not (folder / "tokenizer.json").exists():
        return
    settings = read_json(path) if path.exists() else {}
    if "tokenizer_class" not in settings:
        usual = getattr(checkpoint.family, "TOKENIZER", "PreTrainedTokenizerFast")
        settings["tokenizer_class"] = checkpoint.raw.get("tokenizer_class") or usual
        write_json(path, settings)


def generation_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The source's generation config, or one made from its config.json, with `use_cache` true."""
    path = checkpoint.path / "generation_config.json"
    if path.is_file():
        require_inside(checkpoint.path, path)
        return {**read_json(path), "use_cache": True}
    config = checkpoint.config
    found = {name: checkpoint.raw[name] for name in GENERATION_FIELDS if checkpoint.raw.get(name) is not None}
    tokens = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {**found, **{name: value for name, value in tokens.items() if value is not None}, "use_cache": True}


def write_card(checkpoint: Checkpoint, conversion: Conversion, folder: Path) -> None:
    """README.md: what the checkpoint is, where it comes from, whether it was proved, and how to load it."""
    save_card(checkpoint, folder, "converted to `alibi`", _VERDICTS[conversion.verified], CONVERSION)


def save_card(checkpoint: Checkpoint, folder: Path, title: str, statement: str, record: str) -> None:
    """README.md of a folder made from `checkpoint`.

    Args:
        checkpoint: the source.
        folder: where it goes.
        title: what was done to the source, after its name.
        statement: what a reader must know first.
        record: the file that lists every file and tensor.
    """
    fields = _card_fields(checkpoint)
    if checkpoint.revision is not None and checkpoint.source.count("/") == 1:
        fields["base_model"] = checkpoint.source
    data = ModelCardData(library_name="transformers", tags=["alibi", checkpoint.family_name], **fields)
    licence = "" if "license" in fields else "\nThe source names no licence; ask its authors.\n"
    config = checkpoint.config
    text = f"""---
{data.to_yaml()}
---

# {Path(checkpoint.source).name}, {title}

{statement}
{licence}
Source: `{Path(checkpoint.source).name if checkpoint.path == Path(checkpoint.source) else checkpoint.source}`,
family {checkpoint.family_name}, revision {checkpoint.revision or "not given"}.
{checkpoint.parameters:,} parameters, {config.num_hidden_layers} layers, width {config.hidden_size},
{config.num_attention_heads} heads, made for {config.max_position_embeddings} tokens; longer inputs are allowed.
`{record}` lists every file and tensor.

```python
from transformers import {_auto_class(checkpoint)}

model = {_auto_class(checkpoint)}.from_pretrained("path or id of this folder", trust_remote_code=True)
```
"""
    ModelCard(text, ignore_metadata_errors=True).save(folder / CARD)


def mark_verified(folder: str | Path, proved: bool) -> None:
    """Write the verdict of a later verification into `conversion.json` and onto the card of a converted folder."""
    record, card = Path(folder) / CONVERSION, Path(folder) / CARD
    if record.is_file():
        write_json(record, {**read_json(record), "verified": proved})
    if card.is_file():
        text = card.read_text(encoding="utf-8")
        for verdict in _VERDICTS.values():
            text = text.replace(verdict, _VERDICTS[proved])
        card.write_text(text, encoding="utf-8")


def _auto_class(checkpoint: Checkpoint) -> str:
    return checkpoint.class_name.replace("AlibiFor", "AutoModelFor")


def _card_fields(checkpoint: Checkpoint) -> dict[str, Any]:
    path = checkpoint.path / CARD
    if not path.is_file():
        return {}
    try:
        found = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, YAMLError):  # an unreadable card says nothing
        return {}
    return {name: found[name] for name in _CARD_FIELDS if found.get(name) is not None}


def write_config(checkpoint: Checkpoint, folder: Path, dtype: str) -> None:
    """config.json with architecture, dtype and the auto_map of all heads."""
    config = checkpoint.config
    values = {**json.loads(config.to_json_string()), "architectures": [checkpoint.class_name]}
    values |= {"dtype": dtype, "model_type": config.model_type, "auto_map": dict(config.auto_map)}
    values.pop("_name_or_path", None)
    write_json(folder / "config.json", values)


__all__ = ["generation_config", "mark_verified", "save_card", "write_card", "write_companions", "write_config"]
