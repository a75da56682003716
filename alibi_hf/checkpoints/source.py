"""`Checkpoint`: an upstream checkpoint, opened without loading it; every later step reads it through this class.

Opening reads config.json and the headers of the weight files, finds the family, maps the config and accounts for every
tensor. It never runs code of the source and never reaches out to anything but the Hugging Face Hub.
"""

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import GenerationConfig

from alibi_hf.checkpoints.carried import carried_files, tokenizer_code
from alibi_hf.checkpoints.fetch import fetch
from alibi_hf.checkpoints.json_files import read_json
from alibi_hf.checkpoints.megatron import PATTERN, layer_files, list_layer_files
from alibi_hf.checkpoints.plan import Group, check_dtypes, check_shapes, head_class, make_plan
from alibi_hf.checkpoints.reading import FileState, read_tensor, require_same
from alibi_hf.checkpoints.rules import Rule
from alibi_hf.checkpoints.shards import TensorInfo, describe_file, list_tensors, load_pickle, main_dtype
from alibi_hf.errors import CheckpointFileError, ConfigFieldError, TensorError, in_one_line, redact
from alibi_hf.families import Family, find_family
from alibi_hf.families._fields import GENERATION_FIELDS
from alibi_hf.model.bias_alibi import alibi_slopes
from alibi_hf.model.configuration_alibi import AlibiConfig

GENERATION = "generation_config.json"
PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "LICENSE*", "README.md"]
_SLOPES_EQUAL = 1e-6  # relative: what powers in float32 can be off by
_CHECK_BLOCK = 1 << 24  # elements looked at together for NaN and Inf


@dataclass
class Checkpoint:
    """An opened upstream checkpoint.

    Attributes:
        path: the local folder.
        source: what the caller named, a path or a Hub id.
        revision: the commit of a Hub snapshot, else what the caller gave.
        raw: upstream's config.json.
        tensors: every tensor of the files, by its name there.
        family: the family module.
        config: our config.
        groups: the fate of every tensor, in the order of the model.
        states: size and time of the weight files as they were opened; a file that differs later is refused.
    """

    path: Path
    source: str
    revision: str | None
    raw: dict[str, Any]
    tensors: dict[str, TensorInfo]
    family: Family
    config: AlibiConfig
    groups: list[Group] = field(repr=False)
    states: dict[Path, FileState] = field(default_factory=dict, repr=False)
    _pickles: tuple[tuple[Path, ...], list[dict[str, Tensor]]] | None = field(default=None, repr=False)

    @classmethod
    def open(
        cls,
        path_or_id: str | Path,
        revision: str | None = None,
        allow_pickle: bool = False,
        need_head: bool = True,
        find: Callable[[dict[str, Any], Sequence[str]], Family] = find_family,
        **config_fields: Any,
    ) -> "Checkpoint":
        """Open a folder or a Hub id and account for all of it.

        Args:
            path_or_id: a folder, or "owner/name" on the Hub.
            revision: branch, tag or commit of a Hub id.
            allow_pickle: read `pytorch_model*.bin` or Megatron-DeepSpeed's layer files where there are no safetensors.
            need_head: whether a decoder without any head is an error.
            find: gives the family of a config and the names of the tensors; `retrofit` has layouts of its own.
            config_fields: fields of our config to set on top, such as `alibi_rounding="bloom"`.

        Raises:
            CheckpointFileError, UnsafeSourceError: about the files.
            UnknownFamilyError, ConfigFieldError: about config.json.
            TensorError: about names and shapes.
        """
        folder, commit = locate(path_or_id, revision, allow_pickle)
        raw = read_json(folder / "config.json")
        check_generation(folder, raw)
        tensors = (list_layer_files if layer_files(folder) else list_tensors)(folder, allow_pickle)
        family, config = map_config(find, raw, list(tensors), str(folder / "config.json"))
        config = with_fields(config, config_fields)
        check_rounding(family, config)
        groups = make_plan(family.rules(config), tensors, config.num_hidden_layers)
        opened = cls(folder, str(path_or_id), commit, raw, tensors, family, config, groups)
        opened.states = {shard: FileState.of(shard) for shard in opened.shards}
        check_shapes(groups, {name: info.shape for name, info in tensors.items()}, config, need_head)
        check_dtypes(groups, {name: info.dtype for name, info in tensors.items()})
        opened.config = with_fields(config, {**opened._stored_fields(), **config_fields})
        return opened

    @property
    def family_name(self) -> str:
        """The family's name, such as "bloom"."""
        return self.family.NAMES[0]

    @property
    def class_name(self) -> str:
        """The class of ours that has the checkpoint's head, such as "AlibiForCausalLM"."""
        return head_class(self.groups)

    @property
    def rules(self) -> list[Rule]:
        """The family's rules for this config."""
        return self.family.rules(self.config)

    @cached_property
    def shards(self) -> list[Path]:
        """The weight files, by name."""
        return sorted({path for info in self.tensors.values() for path in info.files})

    @property
    def notes(self) -> list[str]:
        """What a reader of a report should know about this checkpoint, one sentence each."""
        found = [self._slopes_note(group) for group in self.groups if group.fate == "config"]
        return [note for note in [*found, self._tokenizer_note()] if note]

    def _tokenizer_note(self) -> str:
        """That the tokenizer needs code of the source; "" where it does not."""
        code = tokenizer_code(self.path)
        return code and (
            f"tokenizer: its class is code of the source ({code}), which is neither run nor carried over; the files "
            f"alone may cut text in another way, so compare the tokens with the source's"
        )

    def _slopes_note(self, group: Group) -> str:
        """That stored slopes are rounded to 16 bits, or are others than the formula's; "" where neither is so."""
        stored, dtype = self.get(group.source).double().flatten(), self.tensors[group.source].dtype
        formula = torch.tensor(alibi_slopes(self.config.num_attention_heads), dtype=torch.float64)
        far = float(((stored - formula).abs() / formula).max())
        if dtype.itemsize > 2 and far < _SLOPES_EQUAL:
            return ""
        return (
            f"stored slopes: {group.source} is kept as stored, in {str(dtype).removeprefix('torch.')}; it differs from "
            f"ALiBi's formula by at most {far:.1e} of a slope"
        )

    def _stored_fields(self) -> dict[str, list[float]]:
        """The fields of our config that tensors hold: the very numbers, whatever the dtype."""
        fields = {}
        for group in self.groups:
            if group.fate == "config":
                tensor = self.get(group.source)
                require_finite(group.source, tensor)
                if (tensor < 0).any():
                    raise TensorError(
                        f"{group.source} holds the slope {tensor.min().item()}; stored slopes are positive, and the "
                        f"code that adds the bias negates them. Negate the tensor if its owner did so already."
                    )
                fields[group.targets[0]] = tensor.double().flatten().tolist()
        return fields

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most of the values that are read."""
        return main_dtype(self.tensors[group.source] for group in self.groups if group.fate != "dropped")

    @property
    def parameters(self) -> int:
        """Number of values that are used, tied ones once."""
        used = [group.source for group in self.groups if group.fate == "used"]
        return sum(self.tensors[name].bytes // self.tensors[name].dtype.itemsize for name in used)

    def get(self, name: str) -> Tensor:
        """One tensor from the file, by its name there; the memory is freed with it.

        Raises:
            TensorError: if there is no such tensor.
            CheckpointFileError: if the file cannot be read, or changed since it was opened.
        """
        if name not in self.tensors:
            raise TensorError(f"{self.path} holds no tensor {name}.")
        info = self.tensors[name]
        streamed = info.shard.suffix == ".safetensors"
        tensor = read_tensor(info) if streamed else self._from_pickles(info)
        for file in info.files:
            require_same(file, self.states[file])
        return tensor

    def get_rows(self, name: str, first: int, count: int) -> Tensor:
        """`count` rows of a tensor from row `first` on, [count, ...]; of a safetensors file only these are read."""
        info = self.tensors[name]
        if info.shard.suffix != ".safetensors":
            return self.get(name)[first : first + count]
        require_same(info.shard, self.states[info.shard])
        return read_tensor(info, first, count)

    def _from_pickles(self, info: TensorInfo) -> Tensor:
        if self._pickles is None or self._pickles[0] != info.files:
            self._pickles = None  # let go of the last files before the next are opened
            self._pickles = (info.files, [load_pickle(file) for file in info.files])
        return info.assemble(self._pickles[1])

    def check_values(self, group: Group, allow_nonfinite: bool = False) -> None:
        """Look at the values of one group: NaN and Inf are refused, and a tied copy must equal its original.

        Raises:
            TensorError: naming the tensor and what was found.
        """
        tensor = self.get(group.source)
        if not allow_nonfinite:
            require_finite(group.source, tensor)
        if group.fate == "tied":
            original = next(g for g in self.groups if g.fate == "used" and g.targets == group.targets)
            if not torch.equal(tensor, self.get(original.source)):
                raise TensorError(
                    f"{group.source} differs from {original.source}, but tie_word_embeddings in config.json says that "
                    f"they are one; set it to false if both were trained."
                )

    def sha256(self, workers: int = 1) -> list[dict[str, Any]]:
        """Name, SHA-256 and size in bytes of every weight file, read by `workers` threads."""
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(describe_file, self.shards))

    def carried_files(self) -> list[Path]:
        """Tokenizer, chat-template and licence files of the folder, relative to it; see `carried_files`."""
        return carried_files(self.path)


def require_finite(name: str, tensor: Tensor) -> None:
    """`TensorError` with the number of NaN and Inf values in `tensor`, if there are any."""
    if not tensor.is_floating_point():
        return
    nan = inf = 0
    for block in tensor.reshape(-1).split(_CHECK_BLOCK):
        if not torch.isfinite(block).all():
            nan += int(torch.isnan(block).sum())
            inf += int(torch.isinf(block).sum())
    if nan or inf:
        raise TensorError(
            f"{name} holds {nan} NaN and {inf} Inf values of {tensor.numel()}; the checkpoint is damaged, or "
            f"--allow-nonfinite (allow_nonfinite=True) takes it as it is."
        )


def check_generation(folder: Path, raw: dict[str, Any]) -> None:
    """`ConfigFieldError` for generation settings that Transformers refuses: what they came with could not be loaded."""
    path = folder / GENERATION
    values = read_json(path) if path.exists() else {name: raw[name] for name in GENERATION_FIELDS if name in raw}
    try:
        GenerationConfig.from_dict(values)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        where = path if path.exists() else folder / "config.json"
        raise ConfigFieldError(
            f"{where} holds generation settings that Transformers refuses ({in_one_line(error)}); correct them, or "
            f"remove them."
        ) from error


def map_config(
    find: Callable[[dict[str, Any], Sequence[str]], Family], raw: dict[str, Any], tensor_names: Sequence[str], name: str
) -> tuple[Family, AlibiConfig]:
    """The family of a config.json and our config, whatever is in it; `name` is the file's in messages.

    Raises:
        UnknownFamilyError, ConfigFieldError: as the family's own functions, and for values that they trip over.
    """
    try:
        family = find(raw, tensor_names)
        return family, family.config(raw)
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ConfigFieldError(
            f"{name} holds a value of a kind that its field cannot have: {in_one_line(error)}."
        ) from error


def with_fields(config: AlibiConfig, fields: dict[str, Any]) -> AlibiConfig:
    """A copy of `config` with some fields set, validated again; `ConfigFieldError` where that fails."""
    if not fields:
        return config
    changed = copy.deepcopy(config)
    try:
        for name, value in fields.items():
            if not hasattr(changed, name):
                raise ConfigFieldError(f"{name}={value!r} is no field of AlibiConfig.")
            setattr(changed, name, value)
        changed.validate()
    except StrictDataclassError as error:
        said = " ".join(str(error).split())  # one line
        raise ConfigFieldError(f"{fields} cannot be set on this checkpoint's config: {said}") from error
    return changed


def check_rounding(family: Family, config: AlibiConfig) -> None:
    """`ConfigFieldError` where `alibi_rounding` is another family's."""
    if config.alibi_rounding not in family.ROUNDINGS:
        raise ConfigFieldError(
            f"alibi_rounding={config.alibi_rounding!r} is not the rounding of {family.NAMES[0]}; it has "
            f"{' and '.join(family.ROUNDINGS)}."
        )


def locate(path_or_id: str | Path, revision: str | None, allow_pickle: bool) -> tuple[Path, str | None]:
    """The local folder of a path or Hub id, and its revision; downloads from the Hub if need be.

    Raises:
        CheckpointFileError: where it is neither a folder nor to be had from the Hub.
    """
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder, None  # a folder has no revisions
    name = str(path_or_id)
    if folder.exists() or name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise CheckpointFileError(f"{name} is not a folder; give a model folder or a Hub id such as owner/name.")
    if redact(said := f"{name} at revision {revision}") != said:
        raise CheckpointFileError(f"{said} holds an access token: it is not sent. Set HF_TOKEN, and give the id alone.")
    local = fetch(name, PATTERNS + (["*.bin", PATTERN] if allow_pickle else []), revision=revision)
    return local, local.name


__all__ = ["Checkpoint", "check_generation", "check_rounding", "locate", "map_config", "require_finite", "with_fields"]
