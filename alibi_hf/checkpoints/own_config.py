"""config.json of a folder in this package's own layout, which `convert` or `save_pretrained` wrote."""

from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from alibi_hf.checkpoints.json_files import read_json
from alibi_hf.errors import CheckpointFileError, ConfigFieldError
from alibi_hf.model.configuration_alibi import AlibiConfig

_SHOWN = 1000  # characters of a message of Transformers, which repeats the value


def read_own_config(folder: str | Path) -> AlibiConfig:
    """The config of a folder in this package's layout.

    Raises:
        CheckpointFileError: where there is none, or it is another layout's.
        ConfigFieldError: where it contradicts itself.
    """
    path = Path(folder) / "config.json"
    raw = read_json(path)
    if raw.get("model_type") != AlibiConfig.model_type:
        raise CheckpointFileError(
            f"{folder} has model_type={raw.get('model_type')!r}, not {AlibiConfig.model_type!r}: give a folder in this "
            f"package's layout; `alibi-hf convert` makes one of an upstream checkpoint."
        )
    named = raw.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ConfigFieldError(f"{path}: architectures={named!r:.200} should be a list of class names.")
    try:
        return AlibiConfig.from_dict(raw)
    except (StrictDataclassError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigFieldError(f"{path} cannot be read: {str(error)[:_SHOWN]}") from error


__all__ = ["read_own_config"]
