"""lm-evaluation-harness on converted checkpoints: the plain command and `finedeep eval` report the same scores."""

import json
import re
import shutil
import sys

import pytest
from finedeep.demo.questions import write_tasks
from finedeep.demo.world import World
from finedeep.eval import EvaluationError, evaluate, side_by_side
from finedeep.eval.compare.scores import scores_of
from finedeep_cli import main
from isolated import run_isolated


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "tasks"
    return folder, write_tasks(folder, World.from_seed(3), seed=4, samples=8)


@pytest.fixture(scope="module")
def scores(dense, converted, tasks):
    folder, names = tasks
    return {model: scores_of(evaluate(model, names, include_path=folder)) for model in (dense, converted)}


def test_the_exact_conversion_has_the_dense_scores(scores, dense, converted):
    assert {place.task for place in scores[dense]} == {"demo_choice", "demo_last_word", "demo_text", "demo_answer"}
    for key, (score, error, higher) in scores[dense].items():
        found = scores[converted][key]
        assert found[0] == pytest.approx(score, rel=1e-4)
        assert (found[1] is None, found[2]) == (error is None, higher)


def test_perplexity_is_that_of_the_logits(scores, dense, tasks):
    """An independent computation of the rolling task: -log2 p over bytes, from the model's own logits."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer, model = AutoTokenizer.from_pretrained(dense), LlamaForCausalLM.from_pretrained(dense).eval()
    bits = size = 0
    for line in (tasks[0] / "demo_text.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        size += len(text.encode())
        # the harness scores windows of the model's length, every token once, each with as much context as fits
        start = 0
        while start < len(ids):
            window = min(128, len(ids) - start)
            context = ids[max(0, start + window - 128 - 1) : start] or [tokenizer.bos_token_id]
            with torch.no_grad():
                logits = model(torch.tensor([(context + ids[start : start + window])[:-1]])).logits[0]
            picked = logits.log_softmax(-1)[-window:].gather(1, torch.tensor(ids[start : start + window])[:, None])
            bits -= picked.sum().item() / torch.log(torch.tensor(2.0)).item()
            start += window
    assert scores[dense]["demo_text", "bits_per_byte", "none"].value == pytest.approx(bits / size, rel=1e-4)


def test_the_plain_harness_command_reports_the_same(tmp_path, converted, tasks, scores):
    """As a user runs it: the harness's own entry point, in a process that does not know this project."""
    folder, names = tasks
    run_isolated(
        "from lm_eval.__main__ import cli_evaluate; cli_evaluate(); answer = None",
        *("run", "--model", "hf", "--model_args", f"pretrained={converted},trust_remote_code=True"),
        *("--tasks", ",".join(names), "--include_path", folder),
        *("--output_path", tmp_path, "--device", "cpu"),
    )
    (results,) = tmp_path.rglob("results_*.json")
    reported = scores_of(json.loads(results.read_text()))
    for key, (score, _, _) in scores[converted].items():
        assert reported[key][0] == pytest.approx(score, rel=1e-4)


def test_table_of_known_scores():
    results = {
        "results": {
            "t": {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.1, "ppl,none": 3, "ppl_stderr,none": "N/A"}
        },
        "higher_is_better": {"t": {"acc": True, "ppl": False}},
    }
    assert side_by_side({"a": results}).splitlines() == [
        "| Task | Metric | Better |               a |",
        "| ---- | ------ | ------ | --------------: |",
        "| t    | acc    | higher | 0.5000 ± 0.1000 |",
        "| t    | ppl    | lower  |          3.0000 |",
    ]


def test_a_missing_model(capsys, tmp_path, tasks):
    assert main(["eval", str(tmp_path / "nothing"), "--tasks", "demo_text", "--include-path", str(tasks[0])]) == 2
    assert re.fullmatch(r"finedeep: error: \S+/nothing does not exist; [^\n]+\n", capsys.readouterr().err)


def test_without_the_harness_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(EvaluationError, match=r"finedeep\[eval\]"):
        evaluate("anything", ["arc_easy"])
    assert main(["eval", "anything", "--tasks", "arc_easy"]) == 2


@pytest.mark.parametrize("model", ["dense", "converted"])
def test_no_code_of_a_model_is_run(tmp_path, tasks, model, request):
    folder = shutil.copytree(request.getfixturevalue(model), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    evaluate(folder, ["demo_choice"], include_path=tasks[0], limit=1, device="cpu")
    assert not (tmp_path / "ran").exists()
