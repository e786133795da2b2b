"""Two models can be compared sample by sample only where they read the same tokens."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .errors import EvaluationError

# What tokenizers like to differ in: spaces, case, digits, accents, other scripts, line ends, and what they put around.
PROBE = "Once upon a time, in 2024 - naïve Ünïcode; 東京 и Москва!\n\n  def f(x): return x ** 2\t# 3.14159"


def check_same_tokenizer(baseline: str | Path, model: str | Path) -> str:
    """Say how contexts begin, which is the same for both models.

    Raises:
        EvaluationError: the tokenizers differ, or one is missing.
    """
    before, after = _load(baseline), _load(model)
    beginning = _beginning(model, after)
    vocabulary, other = before.get_vocab(), after.get_vocab()
    if vocabulary != other:
        token = next(iter(sorted(vocabulary.items() ^ other.items())))[0]
        found = (
            f"{len(vocabulary)} and {len(other)} tokens; {token!r} is {vocabulary.get(token)} and {other.get(token)}"
        )
    elif before(PROBE)["input_ids"] != after(PROBE)["input_ids"]:
        found = (
            f"{PROBE[:16]!r}... begins with {before.convert_ids_to_tokens(before(PROBE)['input_ids'][:6])} and "
            f"{after.convert_ids_to_tokens(after(PROBE)['input_ids'][:6])}"
        )
    elif (before.bos_token_id, before.eos_token_id) != (after.bos_token_id, after.eos_token_id):
        found = (
            f"BOS and EOS are {before.bos_token!r}, {before.eos_token!r} and {after.bos_token!r}, {after.eos_token!r}"
        )
    else:
        return beginning
    raise EvaluationError(
        f"the tokenizers of {baseline} and {model} differ ({found}); models with the same tokenizer are wanted, such "
        "as a dense model and what it was converted into. Score others one at a time, without --baseline."
    )


def _load(model: str | Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(model)
    except Exception as error:  # what is raised where there is none differs by version
        raise EvaluationError(
            f"{model} has no tokenizer that can be loaded ({' '.join(str(error).split())[:200]})."
        ) from error


def beginning_of(model: str | Path) -> str:
    """Say how contexts begin. Raises `EvaluationError` where the harness could not score with such a tokenizer."""
    return _beginning(model, _load(model))


def _beginning(model: str | Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """What comes before a context. The harness leaves that to the tokenizer."""
    ids = tokenizer(PROBE)["input_ids"]
    bare = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    if ids[-len(bare) :] != bare:
        raise EvaluationError(
            f"the tokenizer of {model} puts {tokenizer.convert_ids_to_tokens(ids[-1:])[0]} at the end of a text, which "
            "the harness would score as part of each answer; one that does not is wanted (add_eos_token false in its "
            "tokenizer_config.json)."
        )
    prefix = tokenizer.bos_token or tokenizer.eos_token
    if prefix is None:
        raise EvaluationError(
            f"the tokenizer of {model} has neither BOS nor EOS; one is wanted, for the harness to begin texts with."
        )
    if begins := tokenizer.convert_ids_to_tokens(ids[: len(ids) - len(bare)]):
        before = " ".join(begins)
        return (
            f"Contexts begin with {before}, as the tokenizer has it; texts scored as a whole begin with {prefix} "
            f"{before}, as the harness has it."
        )
    return f"Contexts begin without BOS, as the tokenizer has it; texts scored as a whole begin with {prefix}."
