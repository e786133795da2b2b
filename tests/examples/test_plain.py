"""Texts as tokens on the disk, packed by document; a plain loop that trains as transformers' Trainer does."""

import inspect
import json
import lzma
import os
import signal
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from finedeep.demo.world import World
from transformers import AutoTokenizer, Trainer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
import packed  # noqa: E402
import plain  # noqa: E402
import prepare  # noqa: E402
from optimisation import groups_of  # noqa: E402
from pretrain import pretrain  # noqa: E402
from recipe import changed  # noqa: E402
from run_log import speed  # noqa: E402
from starting_model import model_of  # noqa: E402


@pytest.fixture
def recipe(tmp_path):
    texts = list(islice(World.from_seed(0).texts(0), 400))
    (tmp_path / "train.txt").write_text("\n".join(texts))
    (tmp_path / "author.txt").write_text("\n".join(texts[:60]))
    recipe = yaml.safe_load((ROOT / "examples/recipes/books-31m.yaml").read_text())
    recipe["tokenizer"]["vocabulary"] = 300
    recipe["data"] |= {"train": str(tmp_path / "train.txt"), "validation": {"author": str(tmp_path / "author.txt")}}
    recipe["data"] |= {"document_characters": 200, "held_out_documents": 9, "validation_sequences": 11, "context": 16}
    recipe["sizes"] |= {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    recipe["sizes"] |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    recipe["training"] |= {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "max_steps": 12}
    recipe["training"] |= {"eval_steps": 4, "logging_steps": 4, "save_steps": 100, "warmup_steps": 3}
    recipe["training"] |= {"learning_rate": 5e-3, "disable_tqdm": True}
    return recipe


@pytest.fixture
def folder(tmp_path, recipe):
    prepare.prepare(recipe, tmp_path / "prepared")
    return tmp_path / "prepared"


def documents(recipe, folder):
    """The text of each document, decoded from the tokens on the disk."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    ids = np.fromfile(folder / "tokens/train.bin", dtype=np.uint16)
    ends = np.load(folder / "tokens/train.npy")
    assert ends[-1] == len(ids)
    assert (ids[ends - 1] == tokenizer.eos_token_id).all()
    return [tokenizer.decode(part[:-1]) for part in np.split(ids, ends[:-1])]


def test_tokens_on_the_disk_are_the_text(recipe, folder):
    found = documents(recipe, folder)
    assert "".join(found).strip() == Path(recipe["data"]["train"]).read_text().strip()
    assert all(len(document) >= 200 for document in found[:-1])


def test_documents_of_lines_and_of_several_compressed_files(tmp_path, recipe):
    lines = [f"Document {i}.\nIt has two lines." for i in range(20)]
    for name, some in (("a", lines[:5]), ("b", lines[5:])):
        with lzma.open(tmp_path / f"{name}.jsonl.xz", "wt") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in some)
    recipe["data"]["train"] = str(tmp_path / "?.jsonl.xz")
    prepare.prepare(recipe, tmp_path / "out")
    assert documents(recipe, tmp_path / "out") == lines


def test_tokens_are_made_once_and_of_no_other_text(recipe, folder):
    made = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*") if path.is_file()}
    prepare.prepare(recipe, folder)
    assert {path: path.stat().st_mtime_ns for path in made} == made
    recipe["data"]["document_characters"] = 300
    with pytest.raises(SystemExit, match="delete it, or name another folder"):
        prepare.prepare(recipe, folder)
    recipe["data"] |= {"train": None, "validation": {"author": None}}  # as on a machine that has the tokens only
    assert len(prepare.prepare(recipe, folder)) == 300


def test_tokens_that_are_not_whole_are_not_there(monkeypatch, tmp_path, recipe):
    monkeypatch.setattr(prepare.np, "save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare.prepare(recipe, tmp_path / "prepared")
    assert not [path for path in tmp_path.rglob("*tokens*") if path.parent.name != "tokenizer"]


def test_a_large_vocabulary_has_wider_tokens():
    assert [np.dtype(prepare.dtype_for(size)).itemsize for size in (2**16, 2**16 + 1)] == [2, 4]


def test_each_pass_has_every_document_once_in_an_order_of_its_own(recipe, folder):
    train, measured = packed.texts_to_train_and_measure_on(recipe["data"], folder)
    assert measured.keys() == {"held_out", "author"}
    assert [len(text) for text in measured.values()] == [11, 11]

    def documents_in(text, windows):
        ids = np.concatenate([text.window(i) for i in windows]).tolist()
        return " ".join(map(str, ids)).split(" 1 ")[:-1]  # 1 is </s>; the last one is cut

    number = len(train)
    first, second = (documents_in(train, range(k * number, (k + 1) * number)) for k in (0, 1))
    assert first != second
    assert len(set(first)) == len(first)
    # what does not fill a pass's last window is in none of its windows
    assert len(set(first) ^ set(second)) <= 4
    held_out = measured["held_out"]
    assert not set(documents_in(held_out.of_length(999), range(held_out.in_a_pass))) & set(first)
    again, _ = packed.texts_to_train_and_measure_on(recipe["data"], folder)
    other, _ = packed.texts_to_train_and_measure_on(recipe["data"] | {"seed": 1}, folder)
    assert documents_in(again, range(number)) == first != documents_in(other, range(number))
    assert train.of_length(3 * number)[3 * number - 1]["labels"].shape == (16,)


def test_what_is_measured_on_is_from_the_whole_text(recipe, folder):
    _, measured = packed.texts_to_train_and_measure_on(recipe["data"], folder)
    author = measured["author"]
    everywhere = [i * author.in_a_pass // 11 for i in range(11)]
    some = [author.window(i).tolist() for i in range(11)]
    assert some == [author.of_length(author.in_a_pass).window(i).tolist() for i in everywhere]
    assert everywhere[-1] > author.in_a_pass * 0.9


def test_a_text_without_a_whole_sequence_is_refused(recipe, folder):
    recipe["data"]["context"] = 100_000
    with pytest.raises(SystemExit, match="train has no 100000 tokens"):
        packed.texts_to_train_and_measure_on(recipe["data"], folder)


def test_only_matrices_decay(recipe, folder):
    model = model_of(recipe, AutoTokenizer.from_pretrained(folder / "tokenizer"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = groups_of(model, 0.1, 1.0, {"router": 0.5})
    by_name = {names[id(p)]: (g["weight_decay"], g["lr"]) for g in groups for p in g["params"]}
    assert by_name.keys() == set(names.values())
    for name, found in by_name.items():
        assert found == (0 if "norm" in name else 0.1, 0.5 if name.endswith("router") else 1.0), name


def curve(log):
    """(step, what, loss) of everything that was logged."""
    lines = map(json.loads, log.read_text().splitlines())
    return {(r["step"], n): r[n] for r in lines for n in r if n.endswith("loss") and "step" in r}


@pytest.fixture
def handlers():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("model", ["llama", "finedeep"])
def test_the_plain_loop_trains_as_the_trainer_does(tmp_path, recipe, folder, handlers, model):
    recipe = changed(recipe, [f"model={model}", f"data.prepared={folder}", "finedeep.sublayer_output_norm=true"])
    pretrain(recipe, tmp_path / "trainer")
    (tmp_path / "plain").mkdir()
    plain.train(recipe, folder, tmp_path / "plain")
    ours, theirs = (curve(tmp_path / name / "log.jsonl") for name in ("plain", "trainer"))
    assert ours.keys() == theirs.keys() == {(s, n) for s in (4, 8, 12) for n in NAMES}
    for place, loss in ours.items():
        assert loss * COUNTED_BY_TRAINER == pytest.approx(theirs[place], abs=2e-4 if COUNTED_BY_TRAINER == 1 else 1e-3)
    lines = [json.loads(line) for line in (tmp_path / "plain/log.jsonl").read_text().splitlines()]
    assert 0 < lines[-1]["nsar"]["0.1"] < 1
    assert ("gate_mean" in lines[-1]) == (model == "finedeep")
    assert all(line["tokens_per_second"] > 0 for line in lines[1:-1])


NAMES = ("loss", "eval_held_out_loss", "eval_author_loss")
# An older Trainer divides by every label, the first of a sequence among them, which no token predicts; its gradients
# are as much smaller, and are clipped a little less.
COUNTED_BY_TRAINER = 1 if "labels_for_count" in inspect.getsource(Trainer) else 15 / 16


def test_a_stopped_loop_goes_on_as_if_it_had_not_been(monkeypatch, tmp_path, recipe, folder, handlers):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for out in (whole, cut):
        out.mkdir()
    plain.train(recipe, folder, whole)
    batches = packed.Packed.batch

    def batch(self, windows):
        if windows == range(24, 28):
            os.kill(os.getpid(), signal.SIGTERM)
        return batches(self, windows)

    monkeypatch.setattr(packed.Packed, "batch", batch)
    with pytest.raises(SystemExit, match="after 7 of 12 steps"):
        plain.train(recipe, folder, cut)
    assert len(curve(cut / "log.jsonl")) == 3
    monkeypatch.undo()
    plain.train(recipe, folder, cut)
    ours, theirs = (curve(out / "log.jsonl") for out in (cut, whole))
    assert ours == pytest.approx(theirs, abs=1e-6)
    assert not (cut / "state.pt").exists()


def test_a_mean_over_windows_is_that_of_each(recipe, folder):
    model = model_of(recipe, AutoTokenizer.from_pretrained(folder / "tokenizer")).eval()
    _, measured = packed.texts_to_train_and_measure_on(recipe["data"], folder)
    losses = plain.Losses(model, torch.device("cpu"), plain.Training.of(recipe))
    ids = measured["author"].batch(range(11))
    with torch.no_grad():
        wanted = model(input_ids=ids, labels=ids).loss.item()
    assert losses.mean(measured["author"]) == pytest.approx(wanted, rel=1e-5)  # 11 windows are no multiple of 4


def test_utilisation_is_of_the_devices_peak(monkeypatch):
    assert speed(1000, 2.0, 1e9) == {"tokens_per_second": 500.0}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, peak in {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA L40": None}.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        found = speed(2_000_000, 2.0, 70e6, processes=2).get("model_flops_utilisation")
        assert found == (peak and round(3 * 70e6 * 1e6 / (2 * peak), 4))
