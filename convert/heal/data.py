"""Packed token windows for healing: of a text file, of a dataset, or sampled from the teacher."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from finedeep_files.errors import ConversionError, one_line
from finedeep_files.options import SELF
from tqdm import tqdm
from transformers import PreTrainedModel

from ..calibrate.text import (
    check_vocabulary,
    document_tokens,
    read_tokens,
    sampled_by_all,
    tokenizer_in,
    window_of,
)

COLUMN = "text"
ANOTHER_SEED = 2**31  # of a seed's bits a CPU's generator takes the lower 32
WINDOWS_OF_A_TEXT = 4  # that is sampled, at most: a longer one takes longer for each of its tokens


def healing_windows(
    data: str,
    folder: Path,
    vocabulary: int,
    context: int,
    tokens: int,
    teacher: PreTrainedModel | None,
    seed: int,
    progress: bool,
    kept: Path | None = None,
) -> torch.Tensor:
    """(windows, context) token ids, up to `tokens` of them, in an order whose beginning can be held out.

    Of several processes each samples its share: where there is sampling to do, all of them have to call this.

    Args:
        data: 'self', a text file or JSON Lines with a `text` in each record, or a dataset as `datasets.load_dataset`
            takes it, with a column `text`; NAME:CONFIG and NAME:CONFIG:SPLIT name a configuration and a split.
        folder: where the tokenizer is.
        vocabulary: tokens that the model knows.
        context: tokens in a window.
        tokens: how many to give.
        teacher: whom to sample from.
        seed: for sampling and the order.
        progress: whether to show a bar.
        kept: the folder, if there is one, in which what was sampled is kept as it comes.

    Raises:
        ConversionError: the data cannot be read.
    """
    if data == SELF:
        # Cut from longer texts: short windows would otherwise be beginnings of texts, all of them.
        length = min(WINDOWS_OF_A_TEXT, max(1, window_of(teacher.config) // context)) * context
        # Another seed than calibration's: what that has learnt from must not be held out, nor be sampled again.
        return sampled_by_all(teacher, tokens, seed + ANOTHER_SEED, progress, length, kept).view(-1, context)
    if Path(data).is_file():
        ids = read_tokens(folder, Path(data), vocabulary, tokens)
    else:
        ids = check_vocabulary(_dataset_tokens(data, folder, tokens, progress), vocabulary, folder)
    windows = ids[: len(ids) // context * context].view(-1, context)
    generator = torch.Generator().manual_seed(seed)
    return windows[torch.randperm(len(windows), generator=generator)[: max(2, tokens // context)]]


def _dataset_tokens(data: str, folder: Path, tokens: int, progress: bool) -> torch.Tensor:
    """The first `tokens` of a dataset's documents, each with the tokenizer's special tokens, EOS between them."""
    ids = islice(document_tokens(tokenizer_in(folder), _documents(data)), tokens)
    bar = tqdm(ids, total=tokens, desc="Reading", unit="tok", unit_scale=True, disable=None if progress else True)
    return torch.tensor(list(bar), dtype=torch.long)


def _documents(data: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise ConversionError(f"{data} is no file here, and reading a dataset wants `pip install datasets`.") from error
    name, _, rest = data.partition(":")
    configuration, _, split = rest.partition(":")
    try:
        rows = datasets.load_dataset(name, configuration or None, split=split or "train", streaming=True)
        for row in rows:
            if COLUMN not in row:
                raise ConversionError(f"dataset {data} has columns {', '.join(row)}; it needs one called '{COLUMN}'.")
            if row[COLUMN] is not None:  # as some datasets have for an empty document
                yield row[COLUMN]
    except ConversionError:
        raise
    except Exception as error:  # what a dataset's loading raises is anybody's guess
        raise ConversionError(
            f"{data} is neither a text file nor a dataset that can be read ({one_line(error)})."
        ) from error
