"""Dense Llama-style checkpoints become Finedeep checkpoints."""

from .checkpoint import Conversion, convert_checkpoint
from .errors import ConversionError

__all__ = ["Conversion", "ConversionError", "convert_checkpoint"]
