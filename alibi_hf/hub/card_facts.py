"""`CardFacts`: what a folder in this package's layout says of itself, as far as a card tells it.

Everything is read from the files of the folder: config.json, the headers of the weights, and the records of what was
done (`conversion.json` or `retrofit.json`), proved (`verification.json`) and measured (`evaluation.json`), if there.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from alibi_hf.checkpoints.json_files import read_json
from alibi_hf.checkpoints.own_config import read_own_config
from alibi_hf.checkpoints.shards import TensorInfo, describe_file, list_tensors, main_dtype
from alibi_hf.errors import CheckpointFileError, ConfigFieldError
from alibi_hf.evaluation.report import Evaluation, ModelEvaluation
from alibi_hf.families import all_families
from alibi_hf.families._about import About
from alibi_hf.hub.proof import CONVERSION, RETROFIT, VERIFICATION, why_not_proved
from alibi_hf.model.configuration_alibi import AlibiConfig
from alibi_hf.verification.report import Check, Control
from alibi_hf.verification.text import TOKENIZER_FILES

EVALUATION, PICTURE = "evaluation.json", "evaluation.png"
# The task of each class, as the Hub names it, and as PEFT does.
TASKS = {
    "AlibiForCausalLM": ("text-generation", "CAUSAL_LM"),
    "AlibiForSequenceClassification": ("text-classification", "SEQ_CLS"),
    "AlibiForTokenClassification": ("token-classification", "TOKEN_CLS"),
    "AlibiForQuestionAnswering": ("question-answering", "QUESTION_ANS"),
    "AlibiModel": ("feature-extraction", "FEATURE_EXTRACTION"),
}


@dataclass(frozen=True)
class CardFacts:
    """What a card is made of.

    Attributes:
        folder: the folder.
        config: its config.
        architecture: the class of ours that has its head, such as "AlibiForCausalLM".
        tensors: what the weight files hold, by name.
        record: `conversion.json` or `retrofit.json`; empty where there is neither.
        retrofitted: whether the record is `retrofit.json`.
        verification: `verification.json`; empty where there is none.
        evaluation: `evaluation.json`, None where there is none.
        written: whether this process wrote the weights, with their hashes in the record.
    """

    folder: Path
    config: AlibiConfig
    architecture: str
    tensors: dict[str, TensorInfo]
    record: dict[str, Any]
    retrofitted: bool
    verification: dict[str, Any]
    evaluation: Evaluation | None
    written: bool = False

    @classmethod
    def read(cls, folder: Path, written: bool = False) -> "CardFacts":
        """Read a folder; `written` spares hashing weights that this process wrote.

        Raises:
            CheckpointFileError: where config, weights or a record cannot be read.
            ConfigFieldError: where config.json contradicts itself, or names another package's class.
        """
        config = read_own_config(folder)
        architecture = (config.architectures or ["none"])[0]
        if architecture not in TASKS:
            raise ConfigFieldError(
                f"{folder / 'config.json'} names the class {architecture!r}; a card is made for {', '.join(TASKS)}."
            )
        retrofitted = (folder / RETROFIT).is_file()
        return cls(
            folder=folder,
            config=config,
            architecture=architecture,
            tensors=list_tensors(folder),
            record=_record(folder / (RETROFIT if retrofitted else CONVERSION)),
            retrofitted=retrofitted,
            verification=_record(folder / VERIFICATION),
            evaluation=_evaluation(folder / EVALUATION),
            written=written,
        )

    @property
    def task(self) -> str:
        """The task as the Hub names it: its `pipeline_tag`."""
        return TASKS[self.architecture][0]

    @property
    def auto_class(self) -> str:
        """The Auto class that loads it with its head."""
        return self.architecture.replace("AlibiFor", "AutoModelFor").replace("AlibiModel", "AutoModel")

    @property
    def parameters(self) -> int:
        """Number of stored values; a tied head is not stored."""
        return sum(info.bytes // info.dtype.itemsize for info in self.tensors.values())

    @property
    def dtype(self) -> str:
        """The dtype of most of the weights."""
        return str(main_dtype(self.tensors.values())).removeprefix("torch.")

    @property
    def source(self) -> dict[str, Any]:
        """path_or_id, revision, family, files and card of what it was made from; empty where no record says."""
        return self.record.get("source", {})

    @property
    def family(self) -> str:
        """The family, or the layout of a retrofit's source; "" where no record says."""
        return self.source.get("family", "")

    @property
    def about(self) -> About:
        """What is known of the family's own code."""
        found = (family for family in all_families() if family.NAMES[0] == self.family)
        return getattr(next(found, None), "ABOUT", About())

    @property
    def base_model(self) -> str | None:
        """The Hub id of the source; None where it was a folder."""
        name = self.source.get("path_or_id")
        if not name or self.source.get("revision") is None:  # a folder has no revision
            return None
        try:
            validate_repo_id(name)
        except HFValidationError:
            return None
        return name

    @property
    def source_name(self) -> str:
        """What to call the source: its Hub id, or the name of its folder without where it was."""
        return self.base_model or Path(self.source.get("path_or_id", "")).name

    @cached_property
    def files(self) -> list[dict[str, Any]]:
        """Name, SHA-256 and bytes of every weight file, as it is now."""
        if self.written:
            return sorted(self.record["output"]["files"], key=lambda file: file["name"])
        return [describe_file(path) for path in sorted({info.shard for info in self.tensors.values()})]

    @cached_property
    def why_not_proved(self) -> str:
        """Why it is not the folder whose parity was proved; "" where it is."""
        return why_not_proved(self.folder, self.files)

    @property
    def tokenizer(self) -> dict[str, Any] | None:
        """tokenizer_config.json; None where there is no tokenizer that loads without code of its own."""
        if not any((self.folder / name).is_file() for name in TOKENIZER_FILES):
            return None
        path = self.folder / "tokenizer_config.json"
        settings = read_json(path) if path.is_file() else {}
        return None if "auto_map" in settings else settings

    @property
    def licences(self) -> list[str]:
        """Names of the licence files."""
        return sorted(path.name for path in self.folder.glob("LICENSE*") if path.is_file())

    @property
    def checks(self) -> list[Check]:
        """The comparisons of the verification."""
        return [Check(**check) for check in self.verification.get("checks", [])]

    @property
    def controls(self) -> list[Control]:
        """The wrong conversions of the verification."""
        return [Control(**control) for control in self.verification.get("negative_controls", [])]

    @cached_property
    def reading(self) -> ModelEvaluation | None:
        """This model's part of the evaluation: the one of this size and class, or of several the one of this name."""
        found = [
            model
            for model in (self.evaluation.models if self.evaluation else [])
            if model.model_class == self.architecture and model.parameters == self.parameters and model.readings
        ]
        if len(found) > 1:
            found = [model for model in found if Path(model.path_or_id).name == self.folder.resolve().name]
        return found[0] if len(found) == 1 else None


def _record(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _evaluation(path: Path) -> Evaluation | None:
    if not path.is_file():
        return None
    try:
        return Evaluation.from_dict(read_json(path))
    except (KeyError, TypeError) as error:
        raise CheckpointFileError(
            f"{path} is not what `alibi-hf evaluate` writes ({error}); take it away, or evaluate again."
        ) from error


__all__ = ["EVALUATION", "PICTURE", "TASKS", "CardFacts"]
