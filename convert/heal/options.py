"""What healing is told, and what of it cannot be."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from finedeep_files.errors import ConversionError, check_seed
from finedeep_files.healing_options import HealingOptions
from finedeep_files.options import SELF, check_fields
from transformers import TrainingArguments

# Fields of TrainingArguments that are not the user's.
OWN: Mapping[str, Any] = {
    "eval_on_start": True,  # the receipt has the losses before
    "include_num_input_tokens_seen": "all",  # and what was seen
    "prediction_loss_only": True,
    "remove_unused_columns": False,
    # They would round the model itself, when it is evaluated at the end and then saved.
    "bf16_full_eval": False,
    "fp16_full_eval": False,
}


# Fields for which healing has an option of its own, by that name.
SET_BY_OPTION: Mapping[str, str] = {
    "learning_rate": "learning_rate",
    "max_steps": "steps",
    "num_train_epochs": "steps",
    "per_device_train_batch_size": "batch_size",
    "seed": "seed",
    "resume_from_checkpoint": "resume",
}
# Fields that would be accepted and do nothing.
WITHOUT_EFFECT: Mapping[str, str] = {
    "label_smoothing_factor": "the loss is healing's own; --divergence softens it by what the teacher says",
}
SEED_BITS = 32  # NumPy's, which `Trainer` seeds too


def check_options(o: HealingOptions) -> None:
    """Raise `ConversionError` for an option that cannot be met."""
    check_fields(o)
    check_seed(o.seed, SEED_BITS)
    _check_loss(o)
    _check_training(o)


def _check_loss(o: HealingOptions) -> None:
    if not 0 <= o.divergence <= 1:
        raise ConversionError(f"divergence={o.divergence} is not between 0 (next token only) and 1 (teacher only).")
    if o.teacher is None and (o.divergence > 0 or o.data == SELF):
        wanted = "to sample the text from" if o.data == SELF else f"for divergence={o.divergence}"
        raise ConversionError(f"a teacher is needed {wanted}; name the dense model (--teacher).")
    if o.learning_rate is not None and not 0 < o.learning_rate < math.inf:
        raise ConversionError(f"learning_rate={o.learning_rate} is not a rate; it must be a number above 0.")
    if o.hidden_states is not None and not 0 <= o.hidden_states < math.inf:
        raise ConversionError(f"hidden_states={o.hidden_states} is not a weight; it must be a number from 0 up.")
    if o.hidden_states and o.teacher is None:
        raise ConversionError(f"a teacher is needed for hidden_states={o.hidden_states}; name it (--teacher).")


def _check_training(o: HealingOptions) -> None:
    """Raise `ConversionError` for a field of `TrainingArguments` that is not the user's."""
    given = set(o.training)
    if unknown := given - {field.name for field in dataclasses.fields(TrainingArguments)}:
        raise ConversionError(f"{', '.join(sorted(unknown))}: no field of transformers' TrainingArguments.")
    for name in sorted(SET_BY_OPTION.keys() & given):
        own = SET_BY_OPTION[name]
        raise ConversionError(f"{name}: use healing's own option for it, --{own.replace('_', '-')} ({own}=).")
    for name in sorted(WITHOUT_EFFECT.keys() & given):
        raise ConversionError(f"{name} would have no effect: {WITHOUT_EFFECT[name]}.")
    if taken := given & {*OWN, "output_dir"}:
        raise ConversionError(
            f"{', '.join(sorted(taken))}: healing sets it itself; leave it out. (bf16 and fp16 are free.)"
        )
