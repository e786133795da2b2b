"""Finedeep: dense LLMs with their FFN cut into stacked, fine-grained, always-active experts (arXiv:2502.12928).

Importing the package registers the model with transformers' Auto classes.
"""

import transformers

from . import modeling_finedeep
from .configuration_finedeep import AUTO_MAP, FinedeepConfig, __version__
from .modeling_finedeep import (
    FinedeepForCausalLM,
    FinedeepForQuestionAnswering,
    FinedeepForSequenceClassification,
    FinedeepForTokenClassification,
    FinedeepModel,
    FinedeepPreTrainedModel,
)

transformers.AutoConfig.register(FinedeepConfig.model_type, FinedeepConfig, exist_ok=True)
FinedeepConfig.register_for_auto_class()
for _auto, _reference in AUTO_MAP.items():
    if _auto != "AutoConfig":
        _model = getattr(modeling_finedeep, _reference.rpartition(".")[2])
        getattr(transformers, _auto).register(FinedeepConfig, _model, exist_ok=True)
        _model.register_for_auto_class(_auto)  # so that save_pretrained copies the code into the folder

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
