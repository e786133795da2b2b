"""Benchmark scores by lm-evaluation-harness, dense beside Finedeep."""

from .errors import EvaluationError
from .harness import evaluate
from .table import side_by_side

__all__ = ["EvaluationError", "evaluate", "side_by_side"]
