"""The files that travel beside the weights: model code, tokenizer, licence, config and generation config."""

import json
import shutil
from pathlib import Path
from typing import Any

from alibi_hf.checkpoints.carried import copy_carried, require_inside
from alibi_hf.checkpoints.json_files import read_json
from alibi_hf.checkpoints.source import Checkpoint
from alibi_hf.checkpoints.writer import write_json
from alibi_hf.families._fields import GENERATION_FIELDS
from alibi_hf.model import modeling_alibi


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


def write_config(checkpoint: Checkpoint, folder: Path, dtype: str) -> None:
    """config.json with architecture, dtype and the auto_map of all heads."""
    config = checkpoint.config
    values = {**json.loads(config.to_json_string()), "architectures": [checkpoint.class_name]}
    values |= {"dtype": dtype, "model_type": config.model_type, "auto_map": dict(config.auto_map)}
    values.pop("_name_or_path", None)
    write_json(folder / "config.json", values)


__all__ = ["generation_config", "write_companions", "write_config"]
