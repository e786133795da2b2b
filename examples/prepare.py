"""Tokenise texts once, into files that training maps into memory.

    python examples/prepare.py RECIPE.yaml FOLDER --set data.train=BOOKS.txt.xz

FOLDER/tokenizer is the recipe's tokenizer or one trained on a sample of the training text. FOLDER/tokens has of each
text the tokens of all its documents, one after the other, each ended by the tokenizer's EOS. A line of a .jsonl file is
a document (its field `text`); of any other file whole lines are, as many as have data.document_characters. Both are
made whole or not at all and used again: to train elsewhere, set data.prepared to a copy of FOLDER.
"""

import argparse
import glob
import json
import os
import random
import shutil
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import from_checkout  # noqa: F401
import numpy as np
from filelock import FileLock
from finedeep.demo.dense import train_tokenizer
from mix import OPEN, pieces_of
from recipe import Recipe, read_recipe
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

AT_ONCE = 64  # documents that a thread tokenises at a time
SAMPLE, SAMPLED_FROM = 2000, 50_000  # documents that a tokenizer is trained on, drawn from the text's beginning
CHARACTERS = 2000  # of a document, at least, where the recipe says nothing


def main() -> None:
    """Read the recipe, make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="a YAML file, such as examples/recipes/books-31m.yaml")
    parser.add_argument("folder", type=Path, help="a folder for tokenizer and tokens")
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="A.B=VALUE", help="as in YAML")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing half-made stays
    prepare(read_recipe(arguments.recipe, arguments.changes), arguments.folder)


def prepare(recipe: Recipe, folder: Path) -> PreTrainedTokenizerBase:
    """Make FOLDER/tokenizer and FOLDER/tokens unless they are there, one process at a time.

    Exits where they were made of something else, or where the recipe's texts are not there. Without texts in the
    recipe, whatever is there is taken.
    """
    check_texts(recipe["data"], folder)
    if not recipe["data"]["train"]:
        return AutoTokenizer.from_pretrained(folder / "tokenizer")
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        return made(recipe, folder)


def check_texts(data: Recipe, folder: Path) -> None:
    """Exit unless there are texts to train and to measure on, before anything is made or loaded."""
    if not data["train"] and not (folder / "tokens").is_dir():
        raise SystemExit("the recipe names no text as data.train: --set data.train=FILE")
    if not data["train"]:
        return
    if not data["validation"] and not data.get("held_out_documents"):
        raise SystemExit("the recipe names no text as data.validation: --set data.validation=FILE")
    for name, files in texts_of(data).items():
        field = f"validation.{name}" if isinstance(data["validation"], dict) and name != "train" else name
        if not files or not isinstance(files, str):
            raise SystemExit(f"the recipe names no text as data.{field}: --set data.{field}=FILE")
        files_of(files)


def made(recipe: Recipe, folder: Path) -> PreTrainedTokenizerBase:
    """`prepare`, for one process."""
    tokenizer = tokenizer_of(recipe, folder)
    texts = texts_of(recipe["data"])
    about = {"vocabulary": len(tokenizer), "texts": {name: sizes_of(files) for name, files in texts.items()}}
    about["document_characters"] = characters_of(recipe["data"])
    tokens = folder / "tokens"
    if not tokens.is_dir():
        with made_whole(tokens) as scratch:
            for name, files in texts.items():
                write_tokens(documents_of(files, about["document_characters"]), tokenizer, scratch / name)
            (scratch / "about.json").write_text(json.dumps(about), encoding="utf-8")
    elif (found := json.loads((tokens / "about.json").read_text(encoding="utf-8"))) != about:
        raise SystemExit(f"{tokens} was made of {found}, not of {about}: delete it, or name another folder.")
    return tokenizer


def texts_of(data: Recipe) -> dict[str, str]:
    """By name the files of the training text and of those to measure on."""
    validation = data["validation"] or {}
    return {"train": data["train"]} | (validation if isinstance(validation, dict) else {"validation": validation})


def characters_of(data: Recipe) -> int:
    """How many characters a document has at least."""
    return data.get("document_characters") or CHARACTERS


def tokenizer_of(recipe: Recipe, folder: Path) -> PreTrainedTokenizerBase:
    """The one that the recipe names, otherwise one trained on a sample of the text, once."""
    place = folder / "tokenizer"
    if not place.is_dir():
        if path := recipe["tokenizer"].get("path"):
            tokenizer = AutoTokenizer.from_pretrained(path)
        else:
            documents = documents_of(recipe["data"]["train"], characters_of(recipe["data"]))
            documents = list(islice(documents, SAMPLED_FROM))
            sample = random.Random(0).sample(documents, min(SAMPLE, len(documents)))
            tokenizer = train_tokenizer(iter(sample), recipe["tokenizer"]["vocabulary"])
        with made_whole(place) as scratch:
            tokenizer.save_pretrained(scratch)
    return AutoTokenizer.from_pretrained(place)


class made_whole:  # noqa: N801 - a context manager, used as a function
    """A new folder that is filled beside its place, then moved there."""

    def __init__(self, place: Path):
        self.place, self.scratch = place, place.with_name(f".{place.name}.{os.getpid()}.new")

    def __enter__(self) -> Path:
        self.scratch.mkdir(parents=True)
        return self.scratch

    def __exit__(self, failed: Any, *_: Any) -> None:
        if failed:
            shutil.rmtree(self.scratch)
        else:
            self.scratch.replace(self.place)


def files_of(pattern: str) -> list[Path]:
    """The files that a pattern names, in order. Exits where there are none."""
    files = sorted(map(Path, glob.glob(str(pattern), recursive=True)))
    if not files:
        raise SystemExit(f"Unable to find {pattern}: name a text file, or a pattern of several.")
    return files


def sizes_of(pattern: str) -> dict[str, int]:
    """By the files' names their sizes in bytes: what tells one text from another."""
    return {path.name: path.stat().st_size for path in files_of(pattern)}


def documents_of(pattern: str, characters: int) -> Iterator[str]:
    """The documents of text files, which may be compressed."""
    for path in files_of(pattern):
        with OPEN.get(path.suffix, open)(path, "rt", encoding="utf-8") as lines:
            if ".jsonl" in path.suffixes:
                yield from (json.loads(line)["text"] for line in lines)
            else:
                yield from pieces_of(lines, characters)


def write_tokens(documents: Iterator[str], tokenizer: PreTrainedTokenizerBase, stem: Path) -> None:
    """STEM.bin: all tokens, in 16 bits where they fit; STEM.npy: where in it each document ends, (documents,) int64."""
    saved, local = tokenizer.backend_tokenizer.to_str(), threading.local()
    dtype = dtype_for(len(tokenizer))

    def encode(texts: list[str]) -> list[np.ndarray]:
        if not hasattr(local, "own"):
            local.own = Tokenizer.from_str(saved)
        encoded = local.own.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array([*one.ids, tokenizer.eos_token_id], dtype=dtype) for one in encoded]

    # A tokenizer for each thread: the threads of a single one wait for its cache.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    lengths = [0]
    batches = iter(lambda: list(islice(documents, AT_ONCE)), [])
    with Path(f"{stem}.bin").open("wb") as file, ThreadPoolExecutor(cores := os.cpu_count() or 1) as pool:
        for ids in (ids for done in in_order(pool, encode, batches, 4 * cores) for ids in done):
            file.write(ids.tobytes())
            lengths.append(len(ids))
    np.save(f"{stem}.npy", np.cumsum(lengths, dtype=np.int64)[1:])


def in_order(pool: Executor, work: Callable[[Any], Any], items: Iterable[Any], ahead: int) -> Iterator[Any]:
    """The results of the work on each item, begun for no more than `ahead` items that are not yielded yet."""
    pending: deque[Future] = deque()
    for item in items:
        pending.append(pool.submit(work, item))
        if len(pending) >= ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def dtype_for(vocabulary: int) -> type[np.unsignedinteger]:
    """The smallest that holds every token id."""
    return np.uint16 if vocabulary <= 2**16 else np.uint32


if __name__ == "__main__":
    main()
