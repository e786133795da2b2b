"""Dense Llama-style checkpoints become Finedeep checkpoints.

What runs after what, and where it is:

    source, families, validation    a checkpoint is opened, its family known, what is wrong with it said
    tensor_mapping, assignment      which tensor is made of which, and which neuron goes to which expert
    plan                            all that is decided before a weight is read
    cut                             tensors, made of the dense ones
    calibrate/                      each layer brought nearer to the dense one
    conversion                      all of the above, into a folder
    receipt, code_files             what it was made of, and the code that travels with it
    heal/                           the whole model trained to say what its dense teacher says
    hub/                            published, and kept up to date
    export                          back to a dense model, where it is one
"""

from finedeep_files.conversion_options import Options
from finedeep_files.errors import ConversionError

from .assignment import register_assignment
from .conversion import Conversion, convert_checkpoint, plan_conversion
from .export import export_checkpoint
from .hub import push_folder, refresh_code
from .plan import Plan

__all__ = [
    "Conversion",
    "ConversionError",
    "Options",
    "Plan",
    "convert_checkpoint",
    "export_checkpoint",
    "plan_conversion",
    "push_folder",
    "refresh_code",
    "register_assignment",
]
