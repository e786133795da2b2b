"""The one error that an evaluation reports to its user."""


class EvaluationError(ValueError):
    """The evaluation cannot be done as asked. The message says what was found, what was wanted and what to do."""
