"""The tokens that calibration and healing go by: of a text, or sampled from the dense model itself."""

from collections.abc import Iterable, Iterator
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import torch
from finedeep_files.errors import ConversionError, one_line
from finedeep_files.options import SELF
from finedeep_files.processes import are_several, number_of_processes, process_number
from finedeep_files.progress import Progress
from finedeep_files.shards import save_whole
from finedeep_files.text_files import read_documents
from safetensors.torch import load_file
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ..tokenization import tokenizer_of
from .sharing import from_all

HELD_OUT = 1 / 16  # of the windows
WINDOW = 512  # tokens, or as many as the model has positions for
SAMPLED = "sampled-{}.safetensors"  # a batch of texts, until all are there
AT_A_TIME = 512  # texts that are sampled at a time, at most
CACHE = 2**30  # bytes of their keys and values, at most, on a CPU
CACHE_OF_ACCELERATORS = 2**32
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
AT_ONCE = 64  # documents that are tokenised at a time
CHARACTERS = 16  # that a token is long at most, on average: what of a text is read


def window_of(config: object) -> int:
    """Tokens in a window for a model."""
    return min(WINDOW, config.max_position_embeddings)


def held_out(windows: torch.Tensor) -> int:
    """How many windows, the first ones, are held out from learning."""
    return max(1, round(len(windows) * HELD_OUT))


def read_tokens(folder: Path, text: Path, vocabulary: int, most: int | None = None) -> torch.Tensor:
    """Token ids (tokens,) of a text by a folder's tokenizer; of a long text some `most` or more, from all over it.

    Args:
        folder: where the tokenizer is.
        text: a text file, or JSON Lines, whose records' texts come one after the other, EOS between them.
        vocabulary: tokens that the model knows.
        most: tokens to read at most.

    Raises:
        ConversionError: there is no tokenizer, or not the model's; the text cannot be read or is empty.
    """
    documents = read_documents(text)
    if len(documents) > 1:
        apart = max(1, sum(map(len, documents)) // (most * CHARACTERS)) if most is not None else 1
        ids = torch.tensor([*document_tokens(tokenizer_in(folder), documents[::apart])], dtype=torch.long)
        return check_vocabulary(ids, vocabulary, folder)
    content = documents[0]
    if most is not None and len(content) > most * CHARACTERS:
        pieces = 64
        size, apart = most * CHARACTERS // pieces, len(content) // pieces
        content = "\n".join(content[i * apart : i * apart + size] for i in range(pieces))
    ids = torch.tensor(tokenizer_in(folder)(content, verbose=False)["input_ids"], dtype=torch.long)
    return check_vocabulary(ids, vocabulary, folder)


def document_tokens(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str]) -> Iterator[int]:
    """The token ids of documents, each with the tokenizer's special tokens, EOS between them."""
    documents = iter(documents)
    while some := list(islice(documents, AT_ONCE)):
        for ids in tokenizer(some, verbose=False)["input_ids"]:
            yield from ids
            if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
                yield tokenizer.eos_token_id


def tokenizer_in(folder: Path) -> PreTrainedTokenizerBase:
    """A folder's tokenizer. Raises `ConversionError` where there is none."""
    try:
        if not any((folder / name).is_file() for name in VOCABULARIES):  # some versions make an empty one up
            raise FileNotFoundError(f"none of {', '.join(VOCABULARIES)}")
        return tokenizer_of(folder)
    except Exception as error:  # what is raised where there is none differs by version
        raise ConversionError(
            f"{folder} has no tokenizer that can be loaded ({one_line(error)}); to read "
            "texts, it needs one beside the weights."
        ) from error


def check_vocabulary(ids: torch.Tensor, vocabulary: int, folder: Path) -> torch.Tensor:
    """The token ids, unless the model does not know one of them."""
    if ids.numel() and int(ids.max()) >= vocabulary:
        raise ConversionError(
            f"the tokenizer of {folder} gives token {int(ids.max())}, and the model has {vocabulary} tokens. They do "
            "not belong together."
        )
    return ids


def text_windows(folder: Path, text: Path, config: object, tokens: int) -> torch.Tensor:
    """(windows, seq) token ids: up to `tokens` of them, from all over the text.

    Raises:
        ConversionError: as `read_tokens`, or the text is shorter than two windows.
    """
    length = window_of(config)
    ids = read_tokens(folder, text, config.vocab_size, tokens)
    windows = ids[: len(ids) // length * length].view(-1, length)
    if len(windows) < 2:
        raise ConversionError(
            f"{text} has {len(ids)} tokens; it needs at least {2 * length}, one window of {length} to learn from and "
            f"one to check on. Name a longer text, or '{SELF}' to sample one from the dense model."
        )
    number = min(len(windows), max(2, tokens // length))
    return windows[torch.linspace(0, len(windows) - 1, number).long()]


def sampled_windows(
    model: PreTrainedModel, tokens: int, seed: int, progress: bool, length: int | None = None
) -> torch.Tensor:
    """(windows, length) token ids sampled from a model at temperature 1, each beginning with BOS.

    A model that has no BOS begins each window with a token drawn at random, as does
    LLM-QAT (arXiv:2305.17888), from which the idea is.
    """
    return torch.cat(sampled_batches(model, tokens, seed, progress, length))


def sampled_by_all(
    model: PreTrainedModel,
    tokens: int,
    seed: int,
    progress: bool,
    length: int | None = None,
    folder: Path | None = None,
) -> torch.Tensor:
    """As `sampled_windows`; where there are several processes, each samples its share and gets the whole.

    Args: folder, where each batch is kept as it comes, from which a run that was stopped continues.
    """
    if not are_several():
        return torch.cat(sampled_batches(model, tokens, seed, progress, length, folder=folder))
    mine = sampled_batches(model, tokens, seed, progress, length, process_number(), number_of_processes(), folder)
    turns = zip_longest(*from_all(mine))
    return torch.cat([batch for turn in turns for batch in turn if batch is not None])


@torch.inference_mode()
def sampled_batches(
    model: PreTrainedModel,
    tokens: int,
    seed: int,
    progress: bool,
    length: int | None = None,
    process: int = 0,
    processes: int = 1,
    folder: Path | None = None,
) -> list[torch.Tensor]:
    """Those batches of `sampled_windows` that a process samples: with several, they take turns.

    Each batch has a seed of its own, so that it is the same whoever samples it. Those that `folder` has are taken from
    there, and others are kept there.
    """
    _check_bos(model.config)
    # The checkpoint's own may have penalties, which would make another text than the model's.
    model.generation_config = GenerationConfig()
    length = length or window_of(model.config)
    number, at_a_time = max(2, tokens // length), _at_a_time(model, length)
    sizes = [min(at_a_time, number - done) for done in range(0, number, at_a_time)]
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(2**63 - 1, (len(sizes),), generator=generator).tolist()
    mine = list(enumerate(zip(sizes, seeds, strict=True)))[process::processes]
    total = sum(size for _, (size, _) in mine) * length
    with (
        torch.random.fork_rng([model.device] if model.device.type == "cuda" else []),
        Progress("Sampling", total, "tokens", progress) as bar,
    ):
        return [_kept_or_sampled(folder, i, model, size, own_seed, length, bar) for i, (size, own_seed) in mine]


def remove_sampled(folder: Path) -> None:
    """Remove the batches that were kept, now that all are there."""
    for path in folder.glob(SAMPLED.format("*")):
        path.unlink()


def _kept_or_sampled(
    folder: Path | None, i: int, model: PreTrainedModel, size: int, seed: int, length: int, bar: Progress
) -> torch.Tensor:
    """(size, length) token ids of the batch i."""
    if folder is None:
        return _sampled(model, size, seed, length, bar)
    path = folder / SAMPLED.format(i)
    if path.exists() and (kept := load_file(path)["windows"]).shape == (size, length):
        bar.update(kept.numel())
        return kept
    found = _sampled(model, size, seed, length, bar)
    save_whole({"windows": found.contiguous()}, path)
    return found


def _at_a_time(model: PreTrainedModel, length: int) -> int:
    """How many texts of so many tokens are sampled at a time, by the memory that their keys and values take."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * heads * head_dim * model.dtype.itemsize
    cache = CACHE if model.device.type == "cpu" else CACHE_OF_ACCELERATORS
    return min(AT_A_TIME, max(1, cache // (per_token * length)))


def _sampled(model: PreTrainedModel, size: int, seed: int, length: int, bar: Progress) -> torch.Tensor:
    """(size, length) token ids."""
    torch.manual_seed(seed)
    first = torch.randint(model.config.vocab_size, (size, 1))
    if model.config.bos_token_id is not None:
        first.fill_(model.config.bos_token_id)
    first = first.to(model.device)
    bar.update(size)
    texts = _generate(
        model,
        first,
        attention_mask=torch.ones_like(first),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_beams=1,
        min_length=length,
        max_length=length,
        eos_token_id=None,
        pad_token_id=0,
        cache_implementation="static",  # nothing is copied as the texts grow
        disable_compile=True,
        synced_gpus=False,  # processes may have different numbers of batches
        stopping_criteria=StoppingCriteriaList([_Counting(bar)]),
    )
    return texts.cpu()


class _Counting(StoppingCriteria):
    """Stops nothing: it counts tokens as they come."""

    def __init__(self, bar: Progress):
        self.bar = bar

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.bar.update(len(input_ids))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _check_bos(config: Any) -> None:
    if config.bos_token_id is not None and config.bos_token_id not in range(config.vocab_size):
        raise ConversionError(
            f"the model's config.json has bos_token_id={config.bos_token_id!r}, and the model has {config.vocab_size} "
            "tokens, from 0; put the right one there, or null to have texts begin with tokens drawn at random."
        )


def _generate(model: PreTrainedModel, first: torch.Tensor, **how: Any) -> torch.Tensor:
    try:
        return model.generate(first, **how)
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise ConversionError(
            f"the model's probabilities are NaN or infinite in {model.dtype}, so that no text can be sampled from it; "
            "name a text instead, or a model that is finite."
        ) from error
