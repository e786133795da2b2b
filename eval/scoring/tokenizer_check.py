"""Two models can be compared sample by sample only where they read the same tokens."""

from itertools import zip_longest
from pathlib import Path

from finedeep_files import tokenizers
from finedeep_files.errors import one_line
from finedeep_files.tokenizers import PROBE, first_difference
from transformers import PreTrainedTokenizerBase

from ..errors import EvaluationError


def check_same_tokenizer(baseline: str | Path, model: str | Path) -> str:
    """Say how contexts begin, which is the same for both models.

    Raises:
        EvaluationError: the tokenizers differ, or one is missing.
    """
    before, after = load_tokenizer(baseline), load_tokenizer(model)
    beginning = _beginning(model, after)
    vocabulary, other = before.get_vocab(), after.get_vocab()
    if vocabulary != other:
        token = next(iter(sorted(vocabulary.items() ^ other.items())))[0]
        found = (
            f"{len(vocabulary)} and {len(other)} tokens; {token!r} is {vocabulary.get(token)} and {other.get(token)}"
        )
    elif (text := first_difference(before, after)) is not None:
        tokens = [each.convert_ids_to_tokens(each(text)["input_ids"]) for each in (before, after)]
        same = next(i for i, pair in enumerate(zip_longest(*tokens)) if pair[0] != pair[1])
        found = f"from token {same} of {text[:24]!r}... on, {tokens[0][same:][:6]} and {tokens[1][same:][:6]}"
    elif (before.bos_token_id, before.eos_token_id) != (after.bos_token_id, after.eos_token_id):
        found = (
            f"BOS and EOS are {before.bos_token!r}, {before.eos_token!r} and {after.bos_token!r}, {after.eos_token!r}"
        )
    else:
        return beginning
    raise EvaluationError(
        f"the tokenizers of {baseline} and {model} differ ({found}); only models with the same one can be compared, "
        "such as a dense model and what it was converted into. Score others one at a time, without --baseline."
    )


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """A model's tokenizer. Raises `EvaluationError` where there is none."""
    try:
        return tokenizers.load_tokenizer(model)
    except Exception as error:  # what is raised where there is none differs by version
        raise EvaluationError(f"{model} has no tokenizer that can be loaded ({one_line(error)}).") from error


def beginning_of(model: str | Path) -> str:
    """Say how contexts begin. Raises `EvaluationError` where the harness could not score with such a tokenizer."""
    return _beginning(model, load_tokenizer(model))


def _beginning(model: str | Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """What comes before a context. The harness leaves that to the tokenizer."""
    ids = tokenizer(PROBE)["input_ids"]
    bare = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    if ids[-len(bare) :] != bare:
        raise EvaluationError(
            f"the tokenizer of {model} puts {tokenizer.convert_ids_to_tokens(ids[-1:])[0]} at the end of a text, which "
            "the harness would score as part of each answer; it must not (add_eos_token false in its "
            "tokenizer_config.json)."
        )
    prefix = tokenizer.bos_token or tokenizer.eos_token
    if prefix is None:
        raise EvaluationError(
            f"the tokenizer of {model} has neither BOS nor EOS, and the harness begins texts with one."
        )
    if begins := tokenizer.convert_ids_to_tokens(ids[: len(ids) - len(bare)]):
        before = " ".join(begins)
        return (
            f"Contexts begin with {before}, as the tokenizer has it; texts scored as a whole begin with {prefix} "
            f"{before}, as the harness has it."
        )
    return f"Contexts begin without BOS, as the tokenizer has it; texts scored as a whole begin with {prefix}."
