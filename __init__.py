"""Finedeep: dense LLMs with their FFN cut into stacked, fine-grained, always-active experts (arXiv:2502.12928).

Importing the package registers the model with transformers' Auto classes.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_finedeep import FinedeepConfig
from .modeling_finedeep import (
    FinedeepForCausalLM,
    FinedeepForQuestionAnswering,
    FinedeepForSequenceClassification,
    FinedeepForTokenClassification,
    FinedeepModel,
    FinedeepPreTrainedModel,
)
from .version import __version__

AutoConfig.register(FinedeepConfig.model_type, FinedeepConfig, exist_ok=True)
FinedeepConfig.register_for_auto_class()
for _auto, _model in (
    (AutoModel, FinedeepModel),
    (AutoModelForCausalLM, FinedeepForCausalLM),
    (AutoModelForQuestionAnswering, FinedeepForQuestionAnswering),
    (AutoModelForSequenceClassification, FinedeepForSequenceClassification),
    (AutoModelForTokenClassification, FinedeepForTokenClassification),
):
    _auto.register(FinedeepConfig, _model, exist_ok=True)
    _model.register_for_auto_class(_auto.__name__)  # so that save_pretrained copies the code into the folder

__all__ = [
    "FinedeepConfig",
    "FinedeepForCausalLM",
    "FinedeepForQuestionAnswering",
    "FinedeepForSequenceClassification",
    "FinedeepForTokenClassification",
    "FinedeepModel",
    "FinedeepPreTrainedModel",
    "__version__",
]
