"""The tokenizer of a converted model, which gives the tokens that its dense model's gives."""

import json
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finedeep_files.json_files import read_json, write_json
from finedeep_files.tokenizers import first_difference, load_tokenizer
from transformers import PreTrainedTokenizerBase

from .source import TOKENIZER_CONFIG, companions_in

# What AutoTokenizer may want of config.json.
WANTED = ("model_type", "tokenizer_class", "transformers_version")
# The class that takes tokenizer.json as it is, by its newest name and by the one that every version knows.
NEWEST, AS_THE_FILE = "TokenizersBackend", "PreTrainedTokenizerFast"


def keep_tokens(source: Path, folder: Path, vocabulary: int) -> None:
    """See to it that AutoTokenizer gives the same tokens for a converted folder as for its source.

    transformers 5 goes by the model's type, which is another one now: for a Mistral or Phi-3 it takes tokenizer.json as
    it is, whatever class tokenizer_config.json names; for a type that it does not know it takes that class, which may
    put its own rules in the place of the file's. transformers 4 asks to run the folder's code where no class is named,
    and does not know the class that transformers 5 names. So a class is named where that makes a difference: the one
    that takes the file as it is, else the one that reads the source, which differs by version. Nothing else is done
    where there is no tokenizer that this version reads, and whatever is wrong with one is told of, tokens beyond the
    model's `vocabulary` among it: no weights are lost over it.
    """
    try:
        _keep_tokens(source, folder, vocabulary)
    except Exception as error:  # a stranger's files, and classes of many kinds
        warnings.warn(f"the tokenizer of {source} was copied as it is ({type(error).__name__}: {error}).", stacklevel=2)


def _keep_tokens(source: Path, folder: Path, vocabulary: int) -> None:
    path = folder / TOKENIZER_CONFIG
    known = read_json(path, "the tokenizer's configuration") if path.is_file() else {}
    before = _loaded(source)
    if before is None:
        if known.get("tokenizer_class") == NEWEST:
            write_json(path, {**known, "tokenizer_class": AS_THE_FILE})
        return
    if beyond := sorted((number, token) for token, number in before.get_vocab().items() if number >= vocabulary):
        warnings.warn(
            f"the model of {source} has {vocabulary} tokens, and its tokenizer {len(beyond)} beyond those, such as "
            f"{beyond[0][1]!r} ({beyond[0][0]}): a text or a batch with one of them fails. Resize the dense model's "
            "embeddings, or take them out of the tokenizer.",
            stacklevel=3,
        )
    name = type(before).__name__
    named = [
        {**known, "tokenizer_class": other, "model_input_names": before.model_input_names}
        for other in dict.fromkeys((AS_THE_FILE, AS_THE_FILE if name == NEWEST else name))
    ]
    every_version_knows = known.get("tokenizer_class") not in (None, NEWEST)
    for content in (known, *named) if every_version_knows else (*named, known):
        write_json(path, content)
        after = _loaded(folder)
        if after is not None and first_difference(before, after) is None:
            return
    if not known:
        path.unlink()
    warnings.warn(
        f"a {name} reads {source}; of the converted folder, AutoTokenizer makes other tokens. Use the dense model's "
        "tokenizer with it.",
        stacklevel=3,
    )


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a stranger's folder: no code is run, and config.json takes no more than its size.

    Raises whatever transformers raises where there is none; it differs by version.
    """
    with _alone(folder) as alone:
        return load_tokenizer(alone)


@contextmanager
def _alone(folder: Path) -> Iterator[Path]:
    """A folder with a checkpoint's tokenizer, and of its config.json what says which.

    transformers would make a configuration of it all, with a dictionary of as many labels as it says there are.
    """
    with tempfile.TemporaryDirectory(prefix="finedeep-tokenizer-") as place:
        alone = Path(place)
        for file in companions_in(folder):
            link = alone / file.relative_to(folder)
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(file.resolve())
        config = read_json(folder / "config.json", "the model's configuration")
        said = {field: config[field] for field in WANTED if isinstance(config.get(field), str)}
        (alone / "config.json").write_text(json.dumps(said), encoding="utf-8")
        yield alone


def _loaded(folder: Path) -> PreTrainedTokenizerBase | None:
    try:
        return tokenizer_of(folder)
    except Exception:  # what is raised where there is none differs by version
        return None
