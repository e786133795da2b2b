"""lm-eval tasks from files on disk: a definition for each of the harness's four request types."""

from pathlib import Path
from typing import Any

import yaml

# What a line of the JSONL file holds, and what the harness asks of a model with it.
KINDS: dict[str, dict[str, Any]] = {
    # {"question", "choices", "answer": index}
    "multiple_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    # {"context", "word"}: is the word the model's first choice, and how surprised is it?
    "last_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{' ' + word}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
    },
    # {"text"}
    "text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    # {"question", "answer": text}
    "generation": {
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 16},
        "filter_list": [
            {"name": "stripped", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


def write_task(directory: Path, name: str, kind: str, data: Path) -> Path:
    """Write the definition of task `name` over the JSONL file `data` into `directory`.

    `directory` is then what `lm_eval run --include_path` takes.

    Args:
        directory: an existing folder.
        name: the task's name.
        kind: a key of `KINDS`; it says which fields the lines of `data` need.
        data: the JSONL file. It is named by its full path, since the harness resolves names from its own folder.

    Returns:
        The YAML file.
    """
    definition = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(data.resolve())},
            "cache_dir": str(directory.resolve() / ".cache"),  # beside the task, not in the user's home
        },
        "test_split": "test",
        **KINDS[kind],
        "metadata": {"version": 1.0},
    }
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump(definition, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path
