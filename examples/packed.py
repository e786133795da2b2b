"""Tokens of examples/prepare.py, mapped into memory, as windows to train on and to measure on."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from prepare import dtype_for
from recipe import Recipe
from torch.utils.data import Dataset


class Packed(Dataset):
    """Windows of `context` token ids through documents, one after the other; what does not fill the last is left out.

    With a seed the documents are in a random order, another one in each pass, and windows continue over passes for as
    long as they are asked for. An item has `input_ids` and `labels`, the same (context,) int64.
    """

    def __init__(self, ids: np.ndarray, ends: np.ndarray, documents: np.ndarray, context: int, seed: int | None = None):
        """Args: ids (tokens,); ends (all documents,) of each in ids; documents: which of them, in order."""
        self.ids, self.documents, self.context, self.seed = ids, documents, context, seed
        self.begins, self.ends = np.concatenate([[0], ends[:-1]]), ends
        self.in_a_pass = int((self.ends - self.begins)[documents].sum()) // context
        self.length = self.in_a_pass
        self.known: tuple[int, np.ndarray, np.ndarray] | None = None  # a pass, its order, where its documents end

    def __len__(self) -> int:
        return self.length

    def of_length(self, windows: int) -> "Packed":
        """So many windows: with a seed in as many passes as it takes; else from the whole text. Returns itself."""
        self.length = windows if self.seed is not None else min(windows, self.in_a_pass)
        return self

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.window(i).astype(np.int64))
        return {"input_ids": ids, "labels": ids}

    def batch(self, windows: Iterable[int]) -> torch.Tensor:
        """Several windows (number, context) int64."""
        return torch.from_numpy(np.stack([self.window(i) for i in windows]).astype(np.int64))

    def window(self, i: int) -> np.ndarray:
        """(context,) token ids."""
        passed, i = divmod(i, self.in_a_pass) if self.seed is not None else (0, i * self.in_a_pass // self.length)
        order, ends = self.order_of(passed)
        place, wanted = i * self.context, self.context
        d = int(np.searchsorted(ends, place, side="right"))
        parts = []
        while wanted:
            end = int(self.ends[order[d]])
            begin = end - int(ends[d]) + place
            parts.append(self.ids[begin : min(end, begin + wanted)])
            place += len(parts[-1])
            wanted -= len(parts[-1])
            d += 1
        return np.concatenate(parts)

    def order_of(self, passed: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents of a pass in their order, and where each ends among the pass's tokens."""
        if self.known is None or self.known[0] != passed:
            order = self.documents
            if self.seed is not None:
                order = np.random.default_rng((self.seed, passed)).permutation(order)
            self.known = passed, order, np.cumsum((self.ends - self.begins)[order])
        return self.known[1:]


def texts_to_train_and_measure_on(data: Recipe, folder: Path) -> tuple[Packed, dict[str, Packed]]:
    """The training text in the order of its seed, and by name what is measured on. Exits where a text is too short.

    `held_out_documents` are of the training text, evenly from its beginning to its end, the same for every seed.
    """
    tokens = folder / "tokens"
    about = json.loads((tokens / "about.json").read_text(encoding="utf-8"))
    context = data["context"]

    def mapped(name: str) -> tuple[np.ndarray, np.ndarray]:
        return np.memmap(tokens / f"{name}.bin", dtype_for(about["vocabulary"]), "r"), np.load(tokens / f"{name}.npy")

    ids, ends = mapped("train")
    number = data.get("held_out_documents") or 0
    held_out = np.linspace(0, len(ends) - 1, number).round().astype(np.int64)
    train = Packed(ids, ends, np.setdiff1d(np.arange(len(ends)), held_out), context, data["seed"])
    measured = {"held_out": Packed(ids, ends, held_out, context)} if number else {}
    for name in about["texts"]:
        if name != "train":
            ids, ends = mapped(name)
            measured[name] = Packed(ids, ends, np.arange(len(ends)), context)
    for name, text in {"train": train, **measured}.items():
        if not len(text):
            raise SystemExit(f"{name} has no {context} tokens, which a sequence has; name a longer text.")
    return train, {name: text.of_length(data["validation_sequences"]) for name, text in measured.items()}
