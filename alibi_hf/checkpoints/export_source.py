"""`Converted`: a folder in this package's own layout, opened without loading it; every export reads it through this.

Such folders come from `convert`, from `save_pretrained` of a fine-tuned model, or from training from nothing.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alibi_hf.checkpoints.carried import CARRIED, carried_files
from alibi_hf.checkpoints.conversion import FILE as CONVERSION
from alibi_hf.checkpoints.json_files import read_json
from alibi_hf.checkpoints.own_config import read_own_config
from alibi_hf.checkpoints.plan import meta_model
from alibi_hf.checkpoints.reading import read_tensor
from alibi_hf.checkpoints.shards import TensorInfo, describe_file, list_tensors, main_dtype
from alibi_hf.errors import ConfigFieldError, TensorError
from alibi_hf.model.configuration_alibi import AlibiConfig

CLASSES = (
    "AlibiForCausalLM",
    "AlibiForSequenceClassification",
    "AlibiForTokenClassification",
    "AlibiForQuestionAnswering",
)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Converted:
    """A folder in this package's layout.

    Attributes:
        path: the folder.
        config: its config.
        class_name: our class whose head the weights have.
        tensors: every tensor of the files, by name.
        record: the `conversion.json` of the folder, empty where there is none.
    """

    path: Path
    config: AlibiConfig
    class_name: str
    tensors: dict[str, TensorInfo]
    record: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> "Converted":
        """Open a folder and check that its tensors are those of its config.

        Raises:
            CheckpointFileError: where it is no folder in this package's layout, or files are missing or damaged.
            ConfigFieldError: where config.json contradicts itself.
            TensorError: where tensors are missing, left over, or of another shape than the config gives.
        """
        path = Path(folder).expanduser()
        config = _read_config(path)
        class_name = (config.architectures or CLASSES)[0]
        if class_name not in CLASSES:
            raise TensorError(
                f"{path} holds a {class_name}; {', '.join(CLASSES)} can be exported. Save the model with its head."
            )
        record = read_json(path / CONVERSION) if (path / CONVERSION).is_file() else {}
        opened = cls(path, config, class_name, list_tensors(path), record)
        opened._check_tensors()
        return opened

    def _check_tensors(self) -> None:
        expected = meta_model(self.config, self.class_name).state_dict()
        absent = sorted(expected.keys() - self.tensors.keys() - ({HEAD} if self.tied else set()))
        for what, names in (("lacks", absent), ("also holds", sorted(self.tensors.keys() - expected.keys()))):
            if names:
                raise TensorError(
                    f"{self.path} {what} {', '.join(names[:5])} ({len(names)} such tensors); weights and config.json "
                    f"({self.class_name}) belong together."
                )
        for name, info in self.tensors.items():
            if info.shape != tuple(expected[name].shape):
                raise TensorError(
                    f"{name} has shape {list(info.shape)}, config.json gives {list(expected[name].shape)}; weights and "
                    f"config belong to different checkpoints."
                )

    @property
    def tied(self) -> bool:
        """Whether the language-model head is the embedding."""
        return self.class_name == "AlibiForCausalLM" and self.config.tie_word_embeddings

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most of the values."""
        return main_dtype(self.tensors.values())

    def get(self, name: str) -> Tensor:
        """One tensor from the file; the memory is freed with it. `CheckpointFileError` if the file cannot be read."""
        return read_tensor(self.tensors[name])

    def check_tie(self) -> None:
        """`TensorError` where a tied head is stored all the same and differs from the embedding."""
        if self.tied and HEAD in self.tensors and not torch.equal(self.get(HEAD), self.get(EMBEDDING)):
            raise TensorError(
                f"{HEAD} differs from {EMBEDDING}, but tie_word_embeddings in config.json says that they are one; set "
                f"it to false if both were trained."
            )

    def sha256(self) -> list[dict[str, Any]]:
        """Name, SHA-256 and size in bytes of every weight file."""
        shards = sorted({info.shard for info in self.tensors.values()})
        return [describe_file(path) for path in shards]

    def carried_files(self) -> list[Path]:
        """Tokenizer, chat-template, licence and generation files of the folder, relative to it; see `carried_files`."""
        return carried_files(self.path, (*CARRIED, "generation_config.json"))


def _read_config(path: Path) -> AlibiConfig:
    config = read_own_config(path)
    if (quantised := getattr(config, "quantization_config", None)) is not None:
        raise ConfigFieldError(
            f"{path} is quantised (quantization_config={quantised!r:.80}); export the unquantised weights, the target "
            f"has its own quantisation."
        )
    return config


__all__ = ["CLASSES", "EMBEDDING", "HEAD", "Converted"]
