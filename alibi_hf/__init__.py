"""ALiBi decoders for Transformers: load, convert, prove and run every published ALiBi checkpoint.

Importing the package registers `AlibiConfig` and the models with Transformers' Auto classes, and lets
`AlibiForCausalLM.from_pretrained` read folders in an upstream layout; where PEFT is installed, it learns which modules
of these models to adapt, and `transformers serve` finds the models by their names. Nothing else happens.
"""

from importlib.metadata import PackageNotFoundError, version

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from alibi_hf.adapters import register_target_modules
from alibi_hf.checkpoints.conversion import Conversion
from alibi_hf.checkpoints.convert import convert
from alibi_hf.checkpoints.direct import install
from alibi_hf.checkpoints.export import Export, export
from alibi_hf.checkpoints.inspect import Inspection, inspect_checkpoint
from alibi_hf.checkpoints.listing import FamilyList, list_families
from alibi_hf.errors import (
    AlibiError,
    CheckpointFileError,
    ConfigFieldError,
    HubError,
    NotProvedError,
    SecretError,
    TensorError,
    UnknownFamilyError,
    UnsafeSourceError,
)
from alibi_hf.evaluation import Evaluation, evaluate
from alibi_hf.evaluation.reach import reach
from alibi_hf.evaluation.reach_report import Reach
from alibi_hf.hub.push import push
from alibi_hf.hub.report import Push
from alibi_hf.model.configuration_alibi import AlibiConfig
from alibi_hf.model.modeling_alibi import (
    AlibiForCausalLM,
    AlibiForQuestionAnswering,
    AlibiForSequenceClassification,
    AlibiForTokenClassification,
    AlibiModel,
    AlibiPreTrainedModel,
)
from alibi_hf.retrofitting import Retrofit, retrofit
from alibi_hf.verification import NotEnoughMemoryError, Verification, verify

try:
    __version__ = version("alibi-hf")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

_AUTO_CLASSES = {
    AutoModel: AlibiModel,
    AutoModelForCausalLM: AlibiForCausalLM,
    AutoModelForSequenceClassification: AlibiForSequenceClassification,
    AutoModelForTokenClassification: AlibiForTokenClassification,
    AutoModelForQuestionAnswering: AlibiForQuestionAnswering,
}


def _register() -> None:
    AutoConfig.register("alibi", AlibiConfig, exist_ok=True)
    AlibiConfig.register_for_auto_class()  # so that saving copies the code files beside the weights
    for auto_class, model_class in _AUTO_CLASSES.items():
        auto_class.register(AlibiConfig, model_class, exist_ok=True)
        model_class.register_for_auto_class(auto_class.__name__)


_register()
install()
register_target_modules()

__all__ = [
    "AlibiConfig",
    "AlibiError",
    "AlibiForCausalLM",
    "AlibiForQuestionAnswering",
    "AlibiForSequenceClassification",
    "AlibiForTokenClassification",
    "AlibiModel",
    "AlibiPreTrainedModel",
    "CheckpointFileError",
    "ConfigFieldError",
    "Conversion",
    "Evaluation",
    "Export",
    "FamilyList",
    "HubError",
    "Inspection",
    "NotEnoughMemoryError",
    "NotProvedError",
    "Push",
    "Reach",
    "Retrofit",
    "SecretError",
    "TensorError",
    "UnknownFamilyError",
    "UnsafeSourceError",
    "Verification",
    "__version__",
    "convert",
    "evaluate",
    "export",
    "inspect_checkpoint",
    "list_families",
    "push",
    "reach",
    "retrofit",
    "verify",
]
