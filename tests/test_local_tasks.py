"""Questions and texts of a folder as tasks of the harness, and what is said of bad ones."""

import json

import pytest
from finedeep.eval import EvaluationError, evaluate
from finedeep.eval.local_tasks import GROUP, PASSAGE, read_passages, read_questions, write_local_tasks
from finedeep.eval.scores import scores_of
from finedeep_cli import main

GOOD = {"question": "2 + 2?", "choices": ["four", "five"], "answer": 0}


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"question": "a?", ', "line 2, is no JSON"),
        ("[1, 2]", "line 2, has the fields of no object"),
        ({"question": "a?", "answer": 1}, "line 2, has the fields question, answer; question \\+ choices"),
        (GOOD | {"answer": 2}, "line 2: answer is 2; .* whole number from 0 to 1"),
        (GOOD | {"answer": -1}, "line 2: answer is -1"),
        (GOOD | {"answer": True}, "line 2: answer is True"),
        (GOOD | {"answer": "0"}, "line 2: answer is '0'"),
        (GOOD | {"choices": ["one"]}, "line 2: choices is .*two texts at least"),
        (GOOD | {"choices": ["one", ""]}, "line 2: choices is"),
        (GOOD | {"question": " "}, "line 2: question is ' '; a text is wanted"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, said):
    path = write(tmp_path / "bad.jsonl", GOOD, line)
    with pytest.raises(EvaluationError, match=rf"bad\.jsonl, {said}"):
        read_questions(path)


def test_unknown_fields_in_the_first_line(tmp_path):
    with pytest.raises(EvaluationError, match=r"line 1, has the fields prompt; question \+ choices \+ answer or"):
        read_questions(write(tmp_path / "bad.jsonl", {"prompt": "?"}))


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.txt"])
def test_an_empty_file_is_named(tmp_path, capsys, dense, name):
    write(tmp_path / name, "  ")
    assert main(["eval", str(dense), "--local", str(tmp_path)]) == 2
    assert f"{name} is empty" in capsys.readouterr().err


def test_a_folder_without_questions(tmp_path, capsys, dense):
    assert main(["eval", str(dense), "--local", str(tmp_path)]) == 2
    assert "no *.jsonl and no *.txt" in capsys.readouterr().err


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EvaluationError, match=r"bytes\.txt cannot be read"):
        write_local_tasks(tmp_path, tmp_path / "tasks")


def test_two_files_of_one_name(tmp_path):
    write(tmp_path / "a.jsonl", GOOD)
    write(tmp_path / "a.txt", "text")
    with pytest.raises(EvaluationError, match="local_a, which there is already"):
        write_local_tasks(tmp_path, tmp_path / "tasks")


def test_a_file_named_like_the_group(tmp_path):
    write(tmp_path / "choice.jsonl", GOOD)
    with pytest.raises(EvaluationError, match="local_choice, which there is already"):
        write_local_tasks(tmp_path, tmp_path / "tasks")


def test_line_separators_that_json_allows_in_texts(tmp_path):
    write(tmp_path / "q.jsonl", json.dumps(GOOD | {"question": "a\u2028b\u0085c"}, ensure_ascii=False), GOOD)
    assert [line["question"] for line in read_questions(tmp_path / "q.jsonl")[1]] == ["a\u2028b\u0085c", "2 + 2?"]


def test_passages_are_the_whole_text(tmp_path):
    text = "".join(f"line {i} of a text\n" for i in range(300)) + "the end"
    write(tmp_path / "t.txt", text)
    passages = [line["text"] for line in read_passages(tmp_path / "t.txt")]
    assert "".join(passages) == text + "\n"
    assert all(PASSAGE <= len(passage) < PASSAGE + 30 for passage in passages[:-1])
    assert len(passages) > 3


@pytest.mark.parametrize("text", ["a word " * 1000, "字" * 5000], ids=["words", "no spaces"])
def test_a_text_without_line_ends_is_passages_too(tmp_path, text):
    write(tmp_path / "t.txt", text)
    passages = [line["text"] for line in read_passages(tmp_path / "t.txt")]
    assert "".join(passages) == text + "\n"
    assert len(passages) > 3
    assert all(PASSAGE <= len(passage) <= PASSAGE + 101 for passage in passages[:-1])
    assert all(passage.endswith((" ", "字")) for passage in passages[:-1])


def test_all_four_request_types_and_the_groups_average(tmp_path, dense):
    write(tmp_path / "one.jsonl", *[GOOD | {"answer": i % 2} for i in range(5)])
    write(tmp_path / "two.jsonl", *[GOOD | {"answer": i % 2, "question": f"{i}?"} for i in range(3)])
    write(tmp_path / "words.jsonl", {"context": "once upon a", "word": "time"}, {"context": "a b", "word": "c"})
    write(tmp_path / "asked.jsonl", {"question": "who?", "answer": "me"})
    write(tmp_path / "story.txt", "a text\n" * 40)
    names = write_local_tasks(tmp_path, tmp_path / "tasks")
    assert sorted(names) == ["local_asked", GROUP, "local_story", "local_words"]
    results = evaluate(dense, names, include_path=tmp_path / "tasks", limit=4)
    types = {name: config["output_type"] for name, config in results["configs"].items()}
    assert sorted(set(types.values())) == [
        "generate_until",
        "loglikelihood",
        "loglikelihood_rolling",
        "multiple_choice",
    ]
    scores = {(place.task, place.metric): score.value for place, score in scores_of(results).items()}
    for metric in ("acc", "acc_norm"):
        mean = (scores["local_one", metric] + scores["local_two", metric]) / 2
        assert scores[GROUP, metric] == pytest.approx(mean)
    assert results["groups"][GROUP]["sample_len"] == 7
