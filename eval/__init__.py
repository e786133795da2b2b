"""Benchmark scores by lm-evaluation-harness, dense beside Finedeep."""

from .compare.table import side_by_side
from .errors import EvaluationError
from .scoring.harness import evaluate

__all__ = ["EvaluationError", "evaluate", "side_by_side"]
