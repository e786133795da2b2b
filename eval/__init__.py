"""Benchmark scores by lm-evaluation-harness, dense beside Finedeep.

What runs after what, and where it is:

    scoring/        what has to be right before a model is scored, local tasks, the harness, answers that are kept
    compare/        scores of two models sample by sample: paired statistics, verdicts, a table
    inspect/        what their FFNs do on a text
    report/         what they cost, and a page with all of it
    evaluation      all of the above, into a folder
"""

from finedeep_files.evaluation_options import EvaluationOptions

from .compare.table import side_by_side
from .errors import EvaluationError
from .scoring.harness import evaluate

__all__ = ["EvaluationError", "EvaluationOptions", "evaluate", "side_by_side"]
