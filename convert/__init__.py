"""Dense Llama-style checkpoints become Finedeep checkpoints."""

from .checkpoint import Conversion, convert_checkpoint, plan_conversion
from .errors import ConversionError
from .export import export_checkpoint
from .neurons import register_assignment
from .publish import push_folder
from .refresh import refresh_code

__all__ = [
    "Conversion",
    "ConversionError",
    "convert_checkpoint",
    "export_checkpoint",
    "plan_conversion",
    "push_folder",
    "refresh_code",
    "register_assignment",
]
