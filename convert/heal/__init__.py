"""Healing: distillation of the whole converted model from its dense teacher.

options                     what there is to say, and what of it cannot be
data                        packed windows: of a text, of a dataset, or sampled from the teacher
trainer                     the loss, in transformers' `Trainer`
training_checkpoints        what stopped runs are resumed from
run                         all of it, into a folder
"""

from finedeep_files.healing_options import HealingOptions

from .run import Healed, heal

__all__ = ["Healed", "HealingOptions", "heal"]
