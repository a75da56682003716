"""config.json of a folder in this package's own layout, which `convert` or `save_pretrained` wrote."""

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from alibi_hf.checkpoints.json_files import read_json
from alibi_hf.errors import CheckpointFileError, ConfigFieldError
from alibi_hf.model.configuration_alibi import AlibiConfig

ADAPTER = "adapter_config.json"


def require_no_adapter(folder: Path) -> None:
    """`CheckpointFileError` where an adapter lies in `folder`, which then computes something else than its weights."""
    if (folder / ADAPTER).exists():
        raise CheckpointFileError(
            f"{folder / ADAPTER}: PEFT's adapter would be put on the model in loading. Move its files to a folder of "
            f"their own, and load it with peft.PeftModel.from_pretrained."
        )


def read_own_config(folder: str | Path) -> AlibiConfig:
    """The config of a folder in this package's layout.

    Raises:
        CheckpointFileError: where there is none, or it is another layout's; where an adapter lies beside it.
        ConfigFieldError: where it contradicts itself.
    """
    path = Path(folder) / "config.json"
    require_no_adapter(path.parent)
    raw = read_json(path)
    if raw.get("model_type") != AlibiConfig.model_type:
        raise CheckpointFileError(
            f"{folder} has model_type={raw.get('model_type')!r}, not {AlibiConfig.model_type!r}: give a folder in this "
            f"package's layout; `alibi-hf convert` makes one of an upstream checkpoint."
        )
    return own_config(raw, str(path))


def own_config(raw: dict[str, Any], name: str) -> AlibiConfig:
    """The config of a config.json in this package's layout; `name` is the file's in a message.

    Raises:
        ConfigFieldError: where it contradicts itself.
    """
    try:
        return AlibiConfig.from_dict(raw)
    except (StrictDataclassError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigFieldError(f"{name} cannot be read: {error}") from error


__all__ = ["own_config", "read_own_config", "require_no_adapter"]
