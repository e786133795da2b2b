"""Questions and texts of a folder as tasks of the harness, and what is said of bad ones."""

import json

import pytest
import torch
import yaml
from conftest import byte_tokenizer
from finedeep.eval import EvaluationError, evaluate
from finedeep.eval.compare.comparison import compare
from finedeep.eval.compare.scores import scores_of
from finedeep.eval.scoring.local_tasks import GROUP, PASSAGE, read_passages, read_questions, write_local_tasks
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
        ({"question": "a?", "answer": 1}, "line 2, has the fields question, answer; it needs question \\+ choices"),
        (GOOD | {"answer": 2}, "line 2: answer is 2; .* whole number from 0 to 1"),
        (GOOD | {"answer": -1}, "line 2: answer is -1"),
        (GOOD | {"answer": True}, "line 2: answer is True"),
        (GOOD | {"answer": "0"}, "line 2: answer is '0'"),
        (GOOD | {"choices": ["one"]}, "line 2: choices is .*two texts or more"),
        (GOOD | {"choices": ["one", ""]}, "line 2: choices is"),
        (GOOD | {"question": " "}, "line 2: question is ' '; it must be a text"),
        (
            GOOD | {"choices": ["one", "\ud83d"]},
            r"line 2: it holds a surrogate \(\\ud800 to \\udfff\) without its other",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, said):
    path = write(tmp_path / "bad.jsonl", GOOD, line)
    with pytest.raises(EvaluationError, match=rf"bad\.jsonl, {said}"):
        read_questions(path)


def test_an_answer_of_two_lines_is_named(tmp_path):
    path = write(tmp_path / "bad.jsonl", {"question": "a?", "answer": "b\n"}, {"question": "a?", "answer": "b\nc"})
    with pytest.raises(EvaluationError, match=r"bad\.jsonl, line 2: answer is 'b\\nc', .* a text of one line"):
        read_questions(path)


def test_unknown_fields_in_the_first_line(tmp_path):
    said = r"line 1, has the fields prompt; it needs question \+ choices \+ answer or"
    with pytest.raises(EvaluationError, match=said):
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
        write_local_tasks(tmp_path, tmp_path / "tasks", byte_tokenizer())


def test_two_files_of_one_name(tmp_path):
    write(tmp_path / "a.jsonl", GOOD)
    write(tmp_path / "a.txt", "text")
    with pytest.raises(EvaluationError, match="local_a, which there is already"):
        write_local_tasks(tmp_path, tmp_path / "tasks", byte_tokenizer())


def test_a_file_named_like_the_group(tmp_path):
    write(tmp_path / "choice.jsonl", GOOD)
    with pytest.raises(EvaluationError, match="local_choice, which there is already"):
        write_local_tasks(tmp_path, tmp_path / "tasks", byte_tokenizer())


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
    names = write_local_tasks(tmp_path, tmp_path / "tasks", byte_tokenizer())
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


def answering(monkeypatch, answers):
    """A model that says what is right, and continues on the next line."""
    from lm_eval.models.huggingface import HFLM

    def generate(self, context, max_length, **more):
        said = [answers[self.tok_decode(ids).split("Question: ")[-1].removesuffix("\nAnswer:")] for ids in context]
        room = max_length - context.shape[1]
        ids = self.tokenizer([f" {answer}\nand so on" + 400 * "." for answer in said], return_tensors="pt")["input_ids"]
        return torch.cat([context, ids[:, :room]], 1)

    monkeypatch.setattr(HFLM, "_model_generate", generate)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param("the quick brown fox jumps over the lazy dog", id="long"),
        pytest.param(" spaces ", id="spaces"),
        pytest.param("a line\n", id="line end"),
        pytest.param("[1, 2]", id="list"),
        pytest.param("1969-07-20", id="date"),
        pytest.param("1969-07-20 10:56:20", id="time"),
        pytest.param("1969-07-20T10:56:20Z", id="time with zone"),
        pytest.param("10:56:20", id="hour"),
        pytest.param("1e3", id="number"),
        pytest.param("true", id="boolean"),
        pytest.param("null", id="null"),
        pytest.param("{{question}}", id="template"),
    ],
)
def test_the_right_answer_is_right(tmp_path, monkeypatch, dense, answer):
    """Of every line: the loader, where it takes strings for something else, does so where all are such."""
    write(tmp_path / "asked.jsonl", {"question": "who?", "answer": answer}, {"question": "what?", "answer": answer})
    names = write_local_tasks(tmp_path, tmp_path / "tasks", byte_tokenizer())
    answering(monkeypatch, {"who?": answer.strip(), "what?": answer.strip()})
    results = evaluate(dense, names, include_path=tmp_path / "tasks", batch_size=1)
    assert [sample["target"] for sample in results["samples"]["local_asked"]] == [answer.strip()] * 2
    assert scores_of(results)["local_asked", "exact_match", "stripped"].value == 1


@pytest.mark.parametrize(("answer", "wanted"), [("4", 16), ("a" * 12, 16), ("a" * 30, 34)])
def test_as_many_tokens_as_the_longest_answer_has(tmp_path, answer, wanted):
    write(tmp_path / "asked.jsonl", {"question": "?", "answer": "a"}, {"question": "?", "answer": answer})
    write_local_tasks(tmp_path, tmp_path / "tasks", byte_tokenizer())
    definition = yaml.safe_load((tmp_path / "tasks/local_asked.yaml").read_text())
    assert definition["generation_kwargs"]["max_gen_toks"] == wanted


def test_a_longer_answer_than_the_right_one_is_wrong(tmp_path, monkeypatch, dense):
    answer = "as long as the longest"
    write(tmp_path / "asked.jsonl", {"question": "who?", "answer": answer})
    names = write_local_tasks(tmp_path, tmp_path / "tasks", byte_tokenizer())
    answering(monkeypatch, {"who?": f"{answer} and longer"})
    results = evaluate(dense, names, include_path=tmp_path / "tasks", batch_size=1)
    assert scores_of(results)["local_asked", "exact_match", "stripped"].value == 0


@pytest.mark.parametrize("choices", [["1969-07-20", "1969-07-21"], ["1", "2"], ["true", "false"], ["[1]", "{{2}}"]])
def test_choices_stay_the_strings_that_they_are(tmp_path, dense, choices):
    write(tmp_path / "when.jsonl", *[GOOD | {"choices": choices, "answer": i} for i in (0, 1)])
    names = write_local_tasks(tmp_path, tmp_path / "tasks", byte_tokenizer())
    results = evaluate(dense, names, include_path=tmp_path / "tasks")
    asked = [pair[1] for sample in results["samples"]["local_when"] for pair in sample["arguments"]]
    assert asked == [f" {choice}" for choice in choices] * 2
    assert [sample["target"] for sample in results["samples"]["local_when"]] == [0, 1]


def test_a_text_like_a_list_is_a_text(tmp_path, dense):
    write(tmp_path / "texts.jsonl", {"text": "[1, 2, 3]"})
    names = write_local_tasks(tmp_path, tmp_path / "tasks", byte_tokenizer())
    results = evaluate(dense, names, include_path=tmp_path / "tasks")
    assert results["samples"]["local_texts"][0]["target"] == "[1, 2, 3]"


@pytest.mark.parametrize("text", ["从前有一个小女孩她住在森林里。", "むかしむかしあるところに、", "กาลครั้งหนึ่งนานมาแล้ว"])
def test_a_text_without_spaces(tmp_path, dense, text):
    """Bits per byte by the model's own logits; a perplexity by words would be too large for a number."""
    write(tmp_path / "story.txt", text * 100)
    names = write_local_tasks(tmp_path, tmp_path / "tasks", byte_tokenizer())
    results = evaluate(dense, names, include_path=tmp_path / "tasks", limit=1)
    assert 0 < scores_of(results)["local_story", "bits_per_byte", "none"].value < 100
    (row,) = [row for row in compare(results, results) if row.main]
    assert row.place.metric == "bits_per_byte"


def test_a_perplexity_too_large_for_a_number(tmp_path, dense):
    """Of a task of the harness's own kind, which counts words."""
    write(tmp_path / "story.txt", "从前有一个小女孩她住在森林里。" * 100)
    names = write_local_tasks(tmp_path, tmp_path / "tasks", byte_tokenizer())
    path = tmp_path / "tasks/local_story.yaml"
    definition = yaml.safe_load(path.read_text()) | {"metric_list": [{"metric": "word_perplexity"}]}
    path.write_text(yaml.safe_dump(definition))
    with pytest.raises(EvaluationError, match="has a perplexity on local_story that is too large for a number"):
        evaluate(dense, names, include_path=tmp_path / "tasks", limit=1)
