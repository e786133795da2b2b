"""Chat templates: which one a model has, for the harness to make messages of its questions."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..errors import EvaluationError
from .tokenizer_check import load_tokenizer


def chat_template_of(model: str | Path, wanted: bool | str, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """A model's chat template; `wanted` is the name of one of several, or True for the one that it uses by itself.

    Raises:
        EvaluationError: it has none, or none of this name.
    """
    found = (tokenizer or load_tokenizer(model)).chat_template
    if not found:
        raise EvaluationError(
            f"{model} has no chat template; score it without --apply-chat-template, or put a chat_template.jinja into "
            "its folder."
        )
    name = "default" if wanted is True else wanted
    if isinstance(found, dict):
        if name in found:
            return found[name]
        raise EvaluationError(f"{model} has no chat template {name!r}; it has {', '.join(sorted(found))}.")
    if name != "default":
        raise EvaluationError(
            f"{model} has no chat template {name!r}, only one without a name; give --apply-chat-template alone."
        )
    return found


def check_same_template(baseline: str | Path, model: str | Path, wanted: bool | str) -> None:
    """Raise `EvaluationError` where two models would be given other messages."""
    if chat_template_of(baseline, wanted) != chat_template_of(model, wanted):
        raise EvaluationError(
            f"the chat templates of {baseline} and {model} differ; the same one is needed to compare them. Copy the "
            "dense model's into the other folder, or score them one at a time, without --baseline."
        )


BEGINNING = "Questions are messages by the chat template; texts scored as a whole are not."
