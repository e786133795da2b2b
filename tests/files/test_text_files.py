"""Texts and JSON Lines: records are read, and JSON is not learned as text."""

import json

import pytest
import torch
from conftest import byte_tokenizer
from finedeep.convert import ConversionError, convert_checkpoint
from finedeep.convert.calibrate.text import read_tokens
from finedeep.convert.heal.data import healing_windows
from finedeep.eval import EvaluationError
from finedeep.eval.inspect.inspection import check_text
from finedeep_files.text_files import read_documents

DOCUMENTS = [f"document {i}, a short one." for i in range(200)]


def lines_in(path, documents=DOCUMENTS):
    path.write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in documents))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.txt"])
def test_records_are_read_by_name_or_by_look(tmp_path, name):
    assert read_documents(lines_in(tmp_path / name)) == DOCUMENTS


@pytest.mark.parametrize("content", ["plain\n", '{"a": 1} is how JSON looks\nand so on\n', "[1]\n[2]\n", '{"a": 1}\n'])
def test_other_texts_are_themselves(tmp_path, content):
    (tmp_path / "a.txt").write_text(content)
    assert read_documents(tmp_path / "a.txt") == [content]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"text": "a"}\n{"words": "b"}\n', r"a\.jsonl, line 2, has the fields words; .* needs a 'text'"),
        ("a.jsonl", '{"text": "a"}\nb\n', r"a\.jsonl, line 2, is no JSON object"),
        ("a.jsonl", '{"text": 3}\n', "line 1, has the fields text; in JSON Lines each record needs"),
        ("a.txt", '{"words": "a"}\n{"words": "b"}\n', r"a\.txt, line 1, has the fields words"),
        ("a.json", '{"text": "a"}', r"a\.json is JSON, whose syntax would be learned"),
        ("a.jsonl", " ", "is empty"),
    ],
)
def test_what_cannot_be_read(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConversionError, match=said):
        read_documents(tmp_path / name)


def test_healing_and_calibration_learn_the_records(tmp_path, dense):
    path = lines_in(tmp_path / "a.jsonl")
    tokenizer = byte_tokenizer()
    wanted = [i for text in DOCUMENTS for i in [*tokenizer(text)["input_ids"], 257]]
    assert read_tokens(dense, path, 260).tolist() == wanted
    windows = healing_windows(str(path), dense, 260, 32, 10_000, None, 0, False)
    ordered = torch.tensor(wanted[: len(wanted) // 32 * 32]).view(-1, 32)
    assert sorted(windows.tolist()) == sorted(ordered.tolist())
    quick = {"num_expert_sublayers": 2, "calibration_tokens": 2048, "calibration_steps": 0, "progress": False}
    convert_checkpoint(dense, tmp_path / "out", calibrate=str(path), **quick)


def test_of_many_records_some_from_all_over(tmp_path, dense):
    path = lines_in(tmp_path / "a.jsonl")
    ids = read_tokens(dense, path, 260, most=64)
    text = byte_tokenizer().decode(ids)
    assert 64 <= len(ids) < 2048
    assert "document 0," in text
    assert "document 19" in text


def test_an_inspections_text_is_no_json(tmp_path):
    with pytest.raises(EvaluationError, match="is JSON, whose syntax would be measured"):
        check_text(lines_in(tmp_path / "a.jsonl"))
