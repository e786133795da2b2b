"""lm-eval tasks from files on disk: a definition for each of the harness's four request types."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

from ..errors import EvaluationError

PASSAGE = 1000  # characters, at least: a text is scored in pieces, so that there are samples to compare
PIECE = re.compile(rf".{{{PASSAGE}}}\S{{0,100}}\s?|.+", re.DOTALL)  # of a line; some scripts have no spaces
GROUP = "local_choice"  # the average over tasks of questions with choices
SHORT = 16  # tokens that may be generated where answers are short
BESIDE = 4  # tokens that may be generated beside an answer's own: a space before it, and what shows that it continues
# The fields of a line of the JSONL file, by which its kind is known: the first that fits.
FIELDS = {
    "multiple_choice": ("question", "choices", "answer"),
    "generation": ("question", "answer"),
    "last_word": ("context", "word"),
    "text": ("text",),
}
# What the harness asks of a model with a line. Fields are named where that will do: out of a template that is rendered
# the harness makes lists, of what looks like one.
KINDS: dict[str, dict[str, Any]] = {
    # answer: index
    "multiple_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    # is the word the model's first choice, and how surprised is it?
    "last_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{' ' + word}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
    },
    "text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        # Not by words: in scripts without spaces a passage is one, whose perplexity no number can hold.
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
    },
    # answer: text
    "generation": {
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "answer",
        "filter_list": [
            {"name": "stripped", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


def write_task(directory: Path, name: str, kind: str, data: Path) -> Path:
    """Write task `name` over the JSONL file `data` into `directory`: a definition, and the data as Parquet.

    `directory` is then what `lm_eval run --include_path` takes.

    Args:
        directory: an existing folder.
        name: the task's name.
        kind: a key of `KINDS`. Of "generation", 16 tokens are generated at most.
        data: the JSONL file, each line an object with the `FIELDS` of its kind.

    Returns:
        The YAML file.
    """
    return _write_task(directory, name, kind, [json.loads(line) for line in _read(data).split("\n") if line.strip()])


def _write_task(
    directory: Path, name: str, kind: str, lines: Sequence[Mapping[str, Any]], max_gen_toks: int = SHORT
) -> Path:
    # By way of JSON, strings that look like dates would become dates.
    from pyarrow import Table
    from pyarrow.parquet import write_table

    data = directory.resolve() / f"{name}.parquet"  # the harness resolves names from its own folder
    write_table(Table.from_pylist([{field: line[field] for field in FIELDS[kind]} for line in lines]), data)
    definition = {
        "task": name,
        "dataset_path": "parquet",
        "dataset_kwargs": {
            "data_files": {"test": str(data)},
            "cache_dir": str(directory.resolve() / ".cache"),  # beside the task, not in the user's home
        },
        "test_split": "test",
        **KINDS[kind],
        "metadata": {"version": 1.0},
    }
    if kind == "generation":
        definition["generation_kwargs"] = {"until": ["\n"], "do_sample": False, "max_gen_toks": max_gen_toks}
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump(definition, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def write_local_tasks(source: Path, directory: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Make a task `local_NAME` of each NAME.jsonl and NAME.txt in `source`, and a group of those with choices.

    Data and definitions are written into `directory`, which is then what `--include_path` takes.

    Args:
        source: the folder of questions and texts.
        directory: is made where it is not there.
        tokenizer: the model's; of answers that are generated the longest says how many tokens that may take.

    Returns:
        Names for the harness: the group, if there is one, and the tasks outside it.

    Raises:
        EvaluationError: there is no such file, or a line or text is not as it should be. It names file and line.
    """
    files = sorted(path for path in source.glob("*") if path.suffix in (".jsonl", ".txt")) if source.is_dir() else []
    if not files:
        raise EvaluationError(
            f"{source} holds no *.jsonl and no *.txt; a folder with questions, a JSON object on each line with "
            "question, choices and answer, or with texts is needed."
        )
    directory.mkdir(parents=True, exist_ok=True)
    names: dict[str, list[str]] = {}
    for path in files:
        name = f"local_{re.sub(r'[^A-Za-z0-9_.-]', '_', path.stem)}"
        if name == GROUP or any(name in found for found in names.values()):
            raise EvaluationError(f"{path} would be task {name}, which there is already; give the file another name.")
        kind, lines = read_questions(path) if path.suffix == ".jsonl" else ("text", list(read_passages(path)))
        longest = _longest_answer(lines, tokenizer) if kind == "generation" else 0
        _write_task(directory, name, kind, lines, max(SHORT, longest + BESIDE))
        names.setdefault(kind, []).append(name)
    choices = names.pop("multiple_choice", [])
    others = [name for found in names.values() for name in found]
    if len(choices) < 2:
        return [*choices, *others]
    group = {
        "group": GROUP,
        "task": choices,
        "aggregate_metric_list": [{"metric": metric, "weight_by_size": False} for metric in ("acc", "acc_norm")],
        "metadata": {"version": 1.0},
    }
    (directory / f"{GROUP}.yaml").write_text(yaml.safe_dump(group, sort_keys=False), encoding="utf-8")
    return [GROUP, *others]


def _longest_answer(lines: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> int:
    answers = [line["answer"] for line in lines]
    return max(map(len, tokenizer(answers, add_special_tokens=False, verbose=False)["input_ids"]))


def read_questions(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """The kind of a JSONL file, and its lines. Raises `EvaluationError`, which names the line."""
    lines = []
    kind = None
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as error:
            raise EvaluationError(f"{path}, line {number}, is no JSON ({error}): {line.strip()[:80]}") from error
        fields = tuple(found) if isinstance(found, dict) else ()
        kind = kind or next((kind for kind, wanted in FIELDS.items() if set(wanted) <= set(fields)), None)
        if kind is None or not set(FIELDS[kind]) <= set(fields):
            wanted = " or ".join(" + ".join(names) for names in ([FIELDS[kind]] if kind else FIELDS.values()))
            raise EvaluationError(
                f"{path}, line {number}, has the fields {', '.join(fields) or 'of no object'}; it needs {wanted}."
            )
        if fault := _fault(kind, found):
            raise EvaluationError(f"{path}, line {number}: {fault}.")
        lines.append({name: found[name] for name in FIELDS[kind]})
        if kind == "generation":
            lines[-1]["answer"] = found["answer"].strip()  # as what is generated will be
    if not lines:
        raise EvaluationError(f"{path} is empty; it should have a question, a JSON object, on each line.")
    return kind, lines


def _fault(kind: str, line: Mapping[str, Any]) -> str | None:
    """What is wrong with the values of a line."""
    for name in FIELDS[kind]:
        value = line[name]
        if (kind, name) == ("multiple_choice", "choices"):
            if not isinstance(value, list) or len(value) < 2 or not all(isinstance(c, str) and c for c in value):
                return f"choices is {value!r}; it must be two texts or more"
        elif (kind, name) == ("multiple_choice", "answer"):
            if type(value) is not int or not 0 <= value < len(line["choices"]):
                last = len(line["choices"]) - 1
                return f"answer is {value!r}; it must be the place of the right choice, a whole number from 0 to {last}"
        elif not isinstance(value, str) or not value.strip():
            return f"{name} is {value!r}; it must be a text"
        elif (kind, name) == ("generation", "answer") and "\n" in value.strip():
            return f"answer is {value!r}, and generating ends with the line; it must be a text of one line"
    if re.search("[\ud800-\udfff]", json.dumps([line[name] for name in FIELDS[kind]], ensure_ascii=False)):
        return "it holds a surrogate (\\ud800 to \\udfff) without its other half"
    return None


def read_passages(path: Path) -> Iterator[dict[str, str]]:
    """A text in passages of 1,000 characters or a little more, cut at line ends, in longer lines between words.

    Raises `EvaluationError`.
    """
    text = _read(path)
    if not text.strip():
        raise EvaluationError(f"{path} is empty; it should hold a text.")
    passage = ""
    for piece in (piece for line in text.splitlines(keepends=True) for piece in PIECE.findall(line)):
        passage += piece
        if len(passage) >= PASSAGE:
            yield {"text": passage}
            passage = ""
    if passage.strip():
        yield {"text": passage}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path} cannot be read as UTF-8 text ({error}).") from error
