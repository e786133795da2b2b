"""The one error that an evaluation reports to its user."""

from pathlib import Path

import torch
from finedeep_files.errors import one_line


class EvaluationError(ValueError):
    """The evaluation cannot be done as asked. The message says what was found, what was wanted and what to do."""


def cannot_load(model: str | Path, error: Exception) -> EvaluationError:
    """What to say where a model could not be loaded or run, for whatever reason."""
    if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
        return EvaluationError(f"there is not enough memory for {model}; use a smaller --dtype or a machine with more.")
    said = one_line(error)
    return EvaluationError(f"{model} cannot be loaded as a causal language model ({type(error).__name__}: {said}).")
