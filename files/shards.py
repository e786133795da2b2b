"""Write safetensors shards a tensor at a time.

safetensors itself writes a file from tensors that are all in memory. Here a file's layout is planned from names, shapes
and dtypes, its header is written, and each tensor goes to its place when it is at hand. The format:
https://github.com/huggingface/safetensors#format
"""

import json
import os
import struct
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from safetensors.torch import save_file

from .whole_file import scratch_of

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = {dtype: code for code, dtype in DTYPES.items()}
LARGE = 2**20  # bytes


@dataclass(frozen=True)
class Entry:
    """A tensor of a safetensors file: what its header says. `file` is where one is that has been written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path | None = None

    @property
    def numel(self) -> int:
        """Number of values."""
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """One file and the tensors in it, in the order in which they are written."""

    file_name: str
    entries: tuple[Entry, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(entry.nbytes for entry in self.entries)


def plan_shards(entries: Iterable[Entry], max_bytes: int) -> list[Shard]:
    """Fill shards in order, none larger than `max_bytes` but for one that holds a single larger tensor."""
    groups: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if groups[-1] and size + entry.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.nbytes
    if len(groups) == 1:
        return [Shard(WEIGHTS, tuple(groups[0]))]
    names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    return [Shard(name, tuple(group)) for name, group in zip(names, groups, strict=True)]


def write_index(folder: Path, shards: list[Shard]) -> None:
    """Write the index that transformers reads, where there are several shards."""
    if len(shards) == 1:
        return
    entries = [entry for shard in shards for entry in shard.entries]
    metadata = {"total_size": sum(e.nbytes for e in entries), "total_parameters": sum(e.numel for e in entries)}
    weight_map = {entry.name: shard.file_name for shard in shards for entry in shard.entries}
    index = {"metadata": metadata, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_whole(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a small safetensors file whole or not at all."""
    with scratch_of(path) as scratch:
        save_file(tensors, scratch, metadata)


class ShardWriter:
    """Writes one shard under a temporary name; it has its own name once every tensor is in it and on the disk."""

    def __init__(self, folder: Path, shard: Shard):
        self.path = folder / shard.file_name
        self.unfinished = folder / f"{shard.file_name}.unfinished"
        self.entries = {entry.name: entry for entry in shard.entries}
        header, self.begins = _header(shard.entries)
        self.offsets = dict(self.begins)  # where the next rows of each tensor go
        self.file = self.unfinished.open("wb")
        try:
            self.file.write(header)
            # Claims the space, where the file system can, so that a full disk is known of now and not in an hour.
            if hasattr(os, "posix_fallocate") and shard.nbytes:
                os.posix_fallocate(self.file.fileno(), 0, len(header) + shard.nbytes)
        except BaseException:
            self.file.close()
            raise

    def write(self, name: str, rows: torch.Tensor) -> None:
        """Put the next rows of a tensor into their place, or all of them."""
        entry = self.entries[name]
        assert (rows.shape[1:], rows.dtype) == (entry.shape[1:], entry.dtype), (entry, rows.shape, rows.dtype)
        begin = self.offsets[name]
        self.file.seek(begin)
        self.offsets[name] += self.file.write(rows.contiguous().view(-1).view(torch.uint8).numpy().data)
        if self.offsets[name] - begin >= LARGE and hasattr(os, "posix_fadvise"):
            # On its way to the disk at once, rather than all of a shard when it is finished and everybody waits.
            os.posix_fadvise(self.file.fileno(), begin, self.offsets[name] - begin, os.POSIX_FADV_DONTNEED)

    def finish(self) -> None:
        """Bring the file to the disk and give it its name."""
        with self.file:
            for name, entry in self.entries.items():
                assert self.offsets[name] == self.begins[name] + entry.nbytes, f"{name} was not written whole"
            self.file.flush()
            os.fsync(self.file.fileno())
        self.unfinished.rename(self.path)

    def abandon(self) -> None:
        """Let go of the file, unfinished."""
        self.file.close()


class FolderWriter:
    """Writes the tensors of several shards, shard after shard, while the caller makes the next rows.

    A few blocks of rows are in flight at a time, so that memory stays bounded. An error in writing is raised by a later
    call.
    """

    max_in_flight = 8

    def __init__(self, folder: Path, shards: Iterable[Shard]):
        self.folder = folder
        self.shard_of = {entry.name: shard for shard in shards for entry in shard.entries}
        self.shard: Shard | None = None
        self.writer: ShardWriter | None = None
        self.thread = ThreadPoolExecutor(1)
        self.in_flight: deque[Future] = deque()

    def write(self, name: str, rows: torch.Tensor) -> None:
        """Put the next rows of a tensor into their place, soon. The tensors of a shard have to come one by one."""
        self._wait(self.max_in_flight)
        self.in_flight.append(self.thread.submit(self._write, name, rows))

    def _write(self, name: str, rows: torch.Tensor) -> None:
        if self.shard_of[name] is not self.shard:
            self._finish_shard()
            self.shard = self.shard_of[name]
            self.writer = ShardWriter(self.folder, self.shard)
        self.writer.write(name, rows)

    def _finish_shard(self) -> None:
        if self.writer is not None:
            self.writer.finish()
            self.writer = None

    def _wait(self, fewer_than: int) -> None:
        while len(self.in_flight) >= fewer_than:
            self.in_flight.popleft().result()

    def __enter__(self) -> "FolderWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._wait(1)
                self._finish_shard()
        finally:
            self.thread.shutdown()
            if self.writer is not None:
                self.writer.abandon()


def _header(entries: Iterable[Entry]) -> tuple[bytes, Mapping[str, int]]:
    """The header's bytes, and for each tensor where it begins in the file."""
    described: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin, begins = 0, {}
    # The widest dtype first: then each tensor begins at a multiple of its own width. And by name, as safetensors does.
    for entry in sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name)):
        end = begin + entry.nbytes
        offsets = [begin, end]
        described[entry.name] = {"dtype": CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
        begins[entry.name], begin = begin, end
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    return header, {name: len(header) + begin for name, begin in begins.items()}
