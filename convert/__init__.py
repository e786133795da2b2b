"""Dense Llama-style checkpoints become Finedeep checkpoints."""

from .checkpoint import Conversion, convert_checkpoint, plan_conversion
from .errors import ConversionError
from .export import export_checkpoint
from .neurons import register_assignment

__all__ = [
    "Conversion",
    "ConversionError",
    "convert_checkpoint",
    "export_checkpoint",
    "plan_conversion",
    "register_assignment",
]
