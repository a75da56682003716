"""`AlibiForCausalLM.from_pretrained` on an upstream folder or Hub id: nothing to convert.

The family's rules become Transformers' own weight conversions, registered for a class made for this one load, so that
`device_map`, `dtype`, shards and offload work as they do for any model. Saving afterwards writes our own layout.
"""

import os
import threading
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.distributed import DistributedConfig
from transformers.utils.peft_utils import find_adapter_config_file

from alibi_hf.checkpoints.fetch import fetch
from alibi_hf.checkpoints.json_files import read_json
from alibi_hf.checkpoints.megatron import layer_files
from alibi_hf.checkpoints.own_config import own_config, require_no_adapter
from alibi_hf.checkpoints.rules import Copy
from alibi_hf.checkpoints.shards import PICKLES, SAFETENSORS, require_files_beside
from alibi_hf.checkpoints.source import PATTERNS, Checkpoint, check_generation, check_rounding, map_config, with_fields
from alibi_hf.errors import AlibiError, CheckpointFileError, TensorError
from alibi_hf.families import find_family
from alibi_hf.model.configuration_alibi import AlibiConfig
from alibi_hf.model.pretrained_alibi import NEW_HEADS, AlibiPreTrainedModel

_LOADING = threading.Lock()  # the conversions are registered by name for the whole process
_HUB = ("revision", "cache_dir", "token", "local_files_only", "force_download", "proxies", "subfolder")
# Attributes of a config that from_pretrained takes for itself.
_NOT_FIELDS = ("dtype", "torch_dtype", "name_or_path", "attn_implementation", "architectures", "model_type")
_HEADS = (*NEW_HEADS, "classifier.")  # ours, and upstream's name for another


def load_foreign(cls: type[AlibiPreTrainedModel], source: Any, *args: Any, **kwargs: Any) -> Any:
    """The hook of `AlibiPreTrainedModel.from_pretrained`.

    Args:
        cls: the class to load.
        source: what `from_pretrained` was given.
        args, kwargs: likewise; fields of `AlibiConfig`, such as `alibi_rounding`, are set on the config.

    Returns:
        The model (with `output_loading_info`, model and info), or None where `source` has our own layout or none that
        can be found, which is for Transformers to handle.

    Raises:
        AlibiError: its subclasses, where the source is an upstream checkpoint that cannot be loaded.
    """
    raw = None if source is None or kwargs.get("gguf_file") else _raw_config(source, kwargs)
    named = None if raw is None else raw.get("model_type")
    if raw is None or named == AlibiConfig.model_type or (named is None and kwargs.get("config") is not None):
        _check_own(source, raw, kwargs)
        return None
    hub = {name: kwargs.pop(name) for name in _HUB if name in kwargs}
    for name in ("trust_remote_code", "code_revision"):  # no code of the source is run, whatever they say
        kwargs.pop(name, None)
    allow_pickle = kwargs.pop("use_safetensors", None) is False
    folder = _folder(source, hub, allow_pickle)
    if layer_files(folder):
        raise CheckpointFileError(
            f"{source} holds Megatron-DeepSpeed's layer files, which Transformers' loader cannot put together. Convert "
            f"them first (alibi-hf convert --allow-pickle) and load the result."
        )
    require_no_adapter(folder)
    checkpoint = Checkpoint.open(folder, allow_pickle=allow_pickle, need_head=False)
    _need_metadata(folder)
    _refuse_quantising(checkpoint, kwargs)
    _refuse_sharding(checkpoint, kwargs)
    config = _config(checkpoint, cls, kwargs)
    wants_info = kwargs.pop("output_loading_info", False)
    kwargs["use_safetensors"] = all(shard.suffix == ".safetensors" for shard in checkpoint.shards)
    with _LOADING:
        model, info = _load(cls, checkpoint, config, args, kwargs)
    _check(checkpoint, cls, config, info)
    model.config.name_or_path = str(source)
    return (model, info) if wants_info else model


def install() -> None:
    """Let every Alibi class load upstream checkpoints, and `AlibiConfig` their config.json."""
    AlibiPreTrainedModel.foreign_loader = staticmethod(load_foreign)
    AlibiConfig.foreign_reader = staticmethod(_read_foreign)


def _read_foreign(raw: dict[str, Any]) -> dict[str, Any]:
    return map_config(find_family, raw, (), "config.json")[1].to_dict()


def _raw_config(source: Any, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """config.json, or None where Transformers is left to say what is wrong.

    Raises:
        OSError: of the Hub. Transformers would ask again, and might take what comes for our layout.
        CheckpointFileError: where there is none; Transformers would make a model of the default size.
    """
    local = Path(source).expanduser() / (kwargs.get("subfolder") or "") / "config.json"
    if os.path.lexists(local):
        return read_json(local)
    hub = {name: kwargs[name] for name in _HUB if kwargs.get(name) is not None}
    try:
        raw = PreTrainedConfig.get_config_dict(source, **hub)[0]
    except (OSError, ValueError) as error:
        if isinstance(error.__cause__, OSError):
            raise
        return None
    if not raw and kwargs.get("config") is None and find_adapter_config_file(source, **hub) is None:
        raise CheckpointFileError(f"{source} holds no config.json; name a folder or Hub id of a whole model.")
    return raw or None


def _folder(source: Any, hub: dict[str, Any], allow_pickle: bool) -> Path:
    subfolder = hub.pop("subfolder", "") or ""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        patterns = [f"{subfolder}/{p}" if subfolder else p for p in PATTERNS + (["*.bin"] if allow_pickle else [])]
        hub = {name: value for name, value in hub.items() if name != "proxies" and value is not None}
        folder = fetch(str(source), patterns, **hub)
    return folder / subfolder


def _check_own(source: Any, raw: dict[str, Any] | None, kwargs: dict[str, Any]) -> None:
    """Refuse a bad config.json or index in our own layout by name, before Transformers reads it."""
    if raw is None or raw.get("model_type") != AlibiConfig.model_type:
        return
    folder = Path(source).expanduser() / (kwargs.get("subfolder") or "")
    require_files_beside(folder)
    if kwargs.get("config") is None:
        own_config(raw, f"config.json of {source}")
        if folder.is_dir():
            check_generation(folder, raw)


def _need_metadata(folder: Path) -> None:
    """Transformers' loader writes into the index's metadata; `CheckpointFileError` where there is none."""
    for index in (folder / SAFETENSORS[0], folder / PICKLES[0]):
        if index.is_file() and not isinstance(read_json(index).get("metadata"), dict):
            raise CheckpointFileError(
                f'{index} has no metadata, without which Transformers does not load it. Put "metadata": {{}} beside '
                f"its weight_map."
            )


def _refuse_quantising(checkpoint: Checkpoint, kwargs: dict[str, Any]) -> None:
    """Transformers quantises while loading, and of a tensor that becomes several it would keep the first."""
    fused = next((group.source for group in checkpoint.groups if len(group.targets) > 1), None)
    if kwargs.get("quantization_config") is not None and fused is not None:
        raise AlibiError(
            f"quantization_config cannot be used on {checkpoint.source} as it is: {fused} becomes several tensors in "
            f"loading, which Transformers does not quantise. Convert it first, and load the converted folder."
        )


def _refuse_sharding(checkpoint: Checkpoint, kwargs: dict[str, Any]) -> None:
    """Under a tensor parallel or FSDP plan each process reads, and would rearrange, a slice of the tensor alone."""
    moved = next(
        (g.source for g in checkpoint.groups if g.fate == "used" and not isinstance(g.rule.operation, Copy)), None
    )
    if moved is not None and _shards(kwargs):
        raise AlibiError(
            f"{moved} of {checkpoint.source} is rearranged in loading, but with tensor parallelism or FSDP by "
            f"distributed_config each process reads only a slice of it. Convert it first (alibi-hf convert), and load "
            f"the converted folder."
        )


def _shards(kwargs: dict[str, Any]) -> bool:
    """Whether Transformers' loader will slice tensors; not where it deals out whole layers (pp_size)."""
    plan = kwargs.get("distributed_config")
    plan = DistributedConfig.from_dict(plan) if isinstance(plan, dict) else plan
    sizes = [getattr(plan, name, None) or 1 for name in ("tp_size", "fsdp_size", "dp_replicate_size")]
    return max(sizes) > 1 or kwargs.get("tp_plan") is not None or (kwargs.get("tp_size") or 1) > 1


def _config(checkpoint: Checkpoint, cls: type[AlibiPreTrainedModel], kwargs: dict[str, Any]) -> AlibiConfig:
    """The checkpoint's config, or the caller's; fields of it are taken out of `kwargs` and set.

    What the caller's leaves open and tensors of the checkpoint say (slopes) is the checkpoint's.
    """
    given = kwargs.pop("config", None)
    if given is not None and getattr(given, "model_type", None) != AlibiConfig.model_type:
        raise AlibiError(
            f"config is a {type(given).__name__}; pass an AlibiConfig, or none and the checkpoint's own is mapped."
        )
    config = checkpoint.config if given is None else given
    stored = (name for group in checkpoint.groups if group.fate == "config" for name in group.targets)
    config = with_fields(config, {n: getattr(checkpoint.config, n) for n in stored if getattr(config, n) is None})
    fields = {name: kwargs.pop(name) for name in list(kwargs) if hasattr(config, name) and name not in _NOT_FIELDS}
    config = with_fields(config, fields)
    check_rounding(checkpoint.family, config)
    config.architectures = [cls.__name__]
    return config


def _load(
    cls: type[AlibiPreTrainedModel],
    checkpoint: Checkpoint,
    config: AlibiConfig,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Any, dict[str, Any]]:
    """The model through Transformers' loader, by way of a class whose name carries the conversions."""
    unread = [rule.source_regex() for rule in checkpoint.rules if rule.fate in ("dropped", "config")]
    made = {"__module__": cls.__module__, "foreign_loader": None, "_keys_to_ignore_on_load_unexpected": unread}
    mapped: Any = type(f"{cls.__name__}From{checkpoint.family_name.title()}", (cls,), made)
    conversions = [rule.to_transformers() for rule in checkpoint.rules]
    register_checkpoint_conversion_mapping(
        mapped.__name__, [conversion for conversion in conversions if conversion is not None], overwrite=True
    )
    model, info = mapped.from_pretrained(checkpoint.path, *args, config=config, output_loading_info=True, **kwargs)
    model.__class__ = _unmapped(type(model), mapped, cls)
    model._weight_conversions = None  # so that saving writes our own layout
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.use_cache = True  # MPT's files say false
    return model, info


def _unmapped(found: type, mapped: type, cls: type) -> type:
    """The class with `cls` in the place of `mapped`: FSDP has put a class of its own in front of it."""
    if found is mapped:
        return cls
    bases = tuple(cls if base is mapped else base for base in found.__bases__)
    return type(f"FSDP{cls.__name__}", bases, {"__module__": found.__module__})


def _check(checkpoint: Checkpoint, cls: type, config: AlibiConfig, info: dict[str, Any]) -> None:
    """Refuse missing tensors outside a new head, leftovers that no rule drops, and a tied head that differs."""
    for group in checkpoint.groups:
        if group.fate == "tied":
            checkpoint.check_values(group, allow_nonfinite=True)
    is_lm = checkpoint.class_name == cls.__name__ == "AlibiForCausalLM"
    missing = [name for name in info["missing_keys"] if is_lm or not name.startswith(_HEADS)]
    if missing:
        raise TensorError(f"{checkpoint.source} lacks {', '.join(sorted(missing)[:5])}, which {cls.__name__} needs.")
    left = [name for name in info["unexpected_keys"] if not name.startswith(_HEADS)]
    if left:
        raise TensorError(f"{checkpoint.source} holds {', '.join(sorted(left)[:5])}, which nothing reads.")


__all__ = ["install", "load_foreign"]
