"""Two models can be compared sample by sample only where they read the same tokens."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .errors import EvaluationError

# What tokenizers like to differ in: spaces, case, digits, accents, other scripts, line ends, and what they put around.
PROBE = "Once upon a time, in 2024 - naïve Ünïcode; 東京 и Москва!\n\n  def f(x): return x ** 2\t# 3.14159"


def check_same_tokenizer(baseline: str | Path, model: str | Path) -> str:
    """Say how contexts begin, the same for both models.

    Raises:
        EvaluationError: the tokenizers differ, or one is missing.
    """
    before, after = _load(baseline), _load(model)
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
        return _beginning(after)
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


def _beginning(tokenizer: PreTrainedTokenizerBase) -> str:
    """What comes before a context. The harness leaves that to the tokenizer."""
    ids = tokenizer(PROBE)["input_ids"]
    bare = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    begins = tokenizer.convert_ids_to_tokens(ids[: len(ids) - len(bare)]) if ids[-len(bare) :] == bare else []
    if begins:
        return f"Contexts begin with {' '.join(begins)}, as the tokenizer has it, for both models."
    prefix = tokenizer.bos_token or tokenizer.eos_token
    return f"Contexts begin without BOS, as the tokenizer has it, for both models; an empty one is {prefix}."
