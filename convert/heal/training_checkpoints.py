"""Train from the last checkpoint of a stopped run to the end, and no further."""

import json
from pathlib import Path
from typing import Any

from finedeep_files.masking import masked
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME


class ArgumentsWithoutSecrets(TrainingArguments):
    """`TrainingArguments` that leave secrets out of the checkpoints, into which `Trainer` pickles them."""

    def __getstate__(self) -> dict[str, Any]:
        return {k: None if isinstance(v, str | dict | list) and masked(v, k) != v else v for k, v in vars(self).items()}


def train_to_the_end(trainer: Trainer, folder: Path) -> None:
    """Train from the last whole checkpoint in a folder, or from the start where there is none.

    From a checkpoint of the last step the trainer is only loaded: `Trainer.train` would take another step.
    """
    checkpoints = whole_checkpoints(folder)
    trainer.add_callback(_StopAtTheEnd())
    try:
        trainer.train(resume_from_checkpoint=str(checkpoints[-1]) if checkpoints else None)
    except _FinishedError:
        trainer.is_in_train = False


def whole_checkpoints(folder: Path) -> list[Path]:
    """`Trainer`'s checkpoints in order, without one that a killed run has left half-made: it writes the state last."""
    found = {path: _step_of(path) for path in folder.glob("checkpoint-*")}
    return sorted((path for path, step in found.items() if path.name == f"checkpoint-{step}"), key=found.get)


def _step_of(checkpoint: Path) -> int | None:
    """The step that a checkpoint's state says, None where that is missing or was cut short."""
    try:
        return json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


class _FinishedError(Exception):
    """All steps have been taken."""


class _StopAtTheEnd(TrainerCallback):
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # By now the checkpoint is loaded. `control` can end training only after a step.
        if state.global_step >= state.max_steps:
            raise _FinishedError
