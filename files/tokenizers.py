"""Tokenizers: how one is loaded, and whether two give the same tokens."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

# What tokenizers like to differ in: spaces, case, digits, accents, other scripts, line ends, how a text begins, ...
PROBE = "Once upon a time, in 2024 - naïve Ünïcode; 東京 и Москва!\n\n  def f(x): return x ** 2\t# 3.14159"
BEGINNINGS = ("", " ", " = ", "\n", "\t")
MOST_SPECIAL = 16


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """AutoTokenizer's, for a folder or a Hub id; no code out of it is run.

    Raises whatever transformers raises where there is none; it differs by version.
    """
    return AutoTokenizer.from_pretrained(model, trust_remote_code=False)


def first_difference(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    """A text that the two do not split into the same tokens, where one is found."""
    special = sorted(getattr(one, "get_added_vocab", dict)())[:MOST_SPECIAL]  # not all classes have it
    around = [f"Hello{token}\nHi{token} you {token}" for token in special]  # ... and what follows a special token
    texts = [*(f"{beginning}{PROBE}" for beginning in BEGINNINGS), *around]
    return next((text for text in texts if one(text)["input_ids"] != other(text)["input_ids"]), None)
