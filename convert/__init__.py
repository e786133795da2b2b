"""Dense Llama-style checkpoints become Finedeep checkpoints."""

from finedeep_files.errors import ConversionError

from .assignment import register_assignment
from .conversion import Conversion, convert_checkpoint, plan_conversion
from .export import export_checkpoint
from .hub.push import push_folder
from .hub.refresh import refresh_code

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
