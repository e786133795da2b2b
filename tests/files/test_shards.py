"""Files written a few rows at a time are what safetensors itself reads; each tensor is aligned to its own width."""

import json
import struct

import pytest
import torch
from finedeep.convert import ConversionError
from finedeep_files.shards import Entry, FolderWriter, ShardWriter, plan_shards, write_index
from finedeep_files.sizes import parse_size, size
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = st.lists(st.integers(0, 7), min_size=1, max_size=3).map(tuple)
ENTRIES = st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES)), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(wanted=ENTRIES, limit=st.integers(1, 600))
def test_what_is_written_is_read(tmp_path_factory, wanted, limit):
    folder = tmp_path_factory.mktemp("shards")
    draw = torch.Generator().manual_seed(0)
    tensors = {f"t{i}": torch.randn(shape, generator=draw).to(dtype) for i, (shape, dtype) in enumerate(wanted)}
    shards = plan_shards([Entry(name, tuple(t.shape), t.dtype) for name, t in tensors.items()], limit)
    with FolderWriter(folder, shards) as writer:
        for name, tensor in tensors.items():
            for rows in tensor.split(2) if len(tensor) else [tensor]:
                writer.write(name, rows)
    write_index(folder, shards)
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
        data = path.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        assert length % 8 == 0
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__" and tensors[name].numel():
                assert entry["data_offsets"][0] % tensors[name].dtype.itemsize == 0
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert all(shard.nbytes <= limit or len(shard.entries) == 1 for shard in shards)
    if len(shards) > 1:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(tensors)


def test_a_tensor_that_lacks_rows_is_noticed(tmp_path):
    (shard,) = plan_shards([Entry("t", (4, 2), torch.float32)], 1000)
    writer = ShardWriter(tmp_path, shard)
    writer.write("t", torch.zeros(3, 2))
    with pytest.raises(AssertionError, match="t was not written whole"):
        writer.finish()
    assert not (tmp_path / shard.file_name).exists()


def test_an_error_in_writing_is_raised(tmp_path):
    (shard,) = plan_shards([Entry("t", (4, 2), torch.float32)], 1000)
    with pytest.raises(AssertionError), FolderWriter(tmp_path, [shard]) as writer:
        writer.write("t", torch.zeros(4, 3))


@pytest.mark.parametrize(("text", "nbytes"), [("5GB", 5 * 10**9), ("1.5 kb", 1500), ("2GiB", 2**31), ("7", 7)])
def test_sizes(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5XB", "nan", "1e400GB", "inf"])
def test_no_sizes(text):
    with pytest.raises(ConversionError, match="is not a size"):
        parse_size(text)


def test_sizes_for_people():
    assert [size(n) for n in (0, 999, 1500, 8.4e9)] == ["0 B", "999 B", "1.5 KB", "8.4 GB"]
