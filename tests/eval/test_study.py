"""A model beside its baseline, from the command to the page."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from browser import CHROMIUM, look
from conftest import byte_tokenizer, make_dense, random_model
from finedeep.convert.hub.card import make_card, read_comparison, read_scores
from finedeep.eval import EvaluationError, evaluate
from finedeep.eval.compare.scores import scores_of
from finedeep.eval.output import name_of
from finedeep.eval.report import cost
from finedeep.eval.scoring.answer_cache import KeptAnswers
from finedeep.eval.scoring.harness import SUITE
from finedeep.eval.scoring.model_identity import identity_of
from finedeep.eval.scoring.tokenizer_check import check_same_tokenizer
from finedeep_cli import main
from finedeep_cli.task_names import check_tasks
from forked import FORKS
from hub_server import running_hub
from transformers import AutoTokenizer, LlamaForCausalLM


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    sums = [
        {"question": f"{a} + {b}?", "choices": [str(a + b), str(a + b + 1)], "answer": (a * b) % 2}
        for a in range(5)
        for b in range(4)
    ]
    (folder / "sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in sums))
    (folder / "story.txt").write_text("Once upon a time there was a number.\n" * 120)
    return folder


@pytest.fixture(scope="module")
def cut(dense, tmp_path_factory):
    """M = 2: another function."""
    from finedeep.convert import convert_checkpoint

    folder = tmp_path_factory.mktemp("cut") / "cut"
    convert_checkpoint(dense, folder, num_expert_sublayers=2, num_experts_per_sublayer=4, progress=False)
    return folder


def command(*words):
    return main(["eval", *map(str, words), "--device", "cpu"])


def test_identical_functions_differ_by_nothing(capsys, dense, converted, questions):
    assert command(converted, "--baseline", dense, "--local", questions, "--quiet") == 0
    printed, told = capsys.readouterr()
    assert "it/s" not in told
    assert "%|" not in told
    verdicts = re.findall(
        r"^local_\w+: (identical) \(\w+ \S+, identical on all \d+ questions\)$", printed, re.MULTILINE
    )
    assert len(verdicts) == 2
    assert "Contexts begin without BOS, as the tokenizer has it; texts scored as a whole begin with <s>." in printed


def test_two_dtypes_are_not_compared_in_silence(tmp_path, capsys, dense, converted, questions):
    shutil.copytree(converted, tmp_path / "half")
    path = tmp_path / "half/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "bfloat16"}))
    shutil.copytree(questions, tmp_path / "questions", ignore=shutil.ignore_patterns("*.txt"))
    words = [tmp_path / "half", "--baseline", dense, "--local", tmp_path / "questions", "--limit", 2, "--quiet"]
    line = "Two dtypes are compared: dense in float32, finedeep in bfloat16. --dtype float32 scores both in one."
    for options, told in (([], True), (["--dtype", "float32"], False)):
        assert command(*words, *options) == 0
        assert (line in capsys.readouterr().out) == told


@pytest.fixture(scope="module")
def done(dense, cut, questions, tmp_path_factory):
    """The command with everything, once."""
    output = tmp_path_factory.mktemp("study") / "results"
    text = questions / "story.txt"
    words = [cut, "--baseline", dense, "--local", questions, "--text", text, "--output", output]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "SECONDS", 0.1)
        assert command(*words, "--seed", 7, "--quiet") == 0
    return output


def test_the_folder_holds_the_harness_results_and_the_comparison(done, dense):
    assert len(list(done.rglob("results_*.json"))) == 2
    assert len(list(done.rglob("samples_*.jsonl"))) == 4
    assert [path.name for path in done.parent.iterdir()] == ["results"]
    comparison = json.loads((done / "comparison.json").read_text())
    rows = {(row["task"], row["metric"]): row for row in comparison["tasks"]}
    samples = {}
    for path in done.rglob("samples_local_sums_*.jsonl"):
        found = {s["doc_id"]: s["acc"] for s in map(json.loads, path.read_text().splitlines())}
        samples["finedeep" if "cut" in path.parent.name else "dense"] = found
    wins = sum(samples["finedeep"][i] > samples["dense"][i] for i in range(20))
    losses = sum(samples["finedeep"][i] < samples["dense"][i] for i in range(20))
    found = rows["local_sums", "acc"]["difference"]
    assert (found["wins"], found["losses"], found["samples"]) == (wins, losses, 20)
    assert rows["local_sums", "acc"]["model"]["value"] == pytest.approx(sum(samples["finedeep"].values()) / 20)
    assert comparison["n-shot"]["local_sums"] == 0
    assert comparison["options"]["seed"] == 7
    cost = comparison["cost"]["models"]
    assert cost["dense"]["parameters"] == LlamaForCausalLM.from_pretrained(dense).num_parameters()
    assert all(found["peak_memory"] > 0 and found["decode"][1] > 0 for found in cost.values())
    # 2 * (weights of all products) at least; attention's scores and the routers come on top.
    assert 1 < cost["finedeep"]["flops_per_token"] / cost["dense"]["flops_per_token"] < 1.2
    assert set(comparison["inspection"]) == {"dense", "finedeep"}


class Links(HTMLParser):
    """What a page refers to."""

    def __init__(self):
        super().__init__()
        self.found, self.tags = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.found += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]


def test_the_page_needs_nothing_else(done):
    page = (done / "report.html").read_text()
    links = Links()
    links.feed(page)
    assert len(links.found) == 3  # gates that are all 1 are not drawn
    assert all(link.startswith("data:image/svg+xml;base64,") for link in links.found)
    assert not {"script", "link", "iframe"} & set(links.tags)
    assert "url(" not in page
    assert "@import" not in page
    assert "local_sums" in page
    assert "NSAR at 0.1" in page
    assert "tokens per second" in page


def test_a_models_name_cannot_break_the_page(tmp_path, done):
    from finedeep.eval.report.page import write_report

    comparison = json.loads((done / "comparison.json").read_text())
    comparison["models"]["finedeep"] = "<script>alert(1)</script>"
    page = write_report(tmp_path, comparison, []).read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_the_card_takes_figures_and_comparison(done):
    scores = read_scores(done)
    comparison = json.loads((done / "comparison.json").read_text())
    wanted = [(row["task"], row["metric"], row["model"]["value"]) for row in comparison["tasks"]]
    assert [(score.dataset_type, score.metric_type, score.metric_value) for score in scores] == wanted
    fields = {"num_hidden_layers": 2, "num_expert_sublayers": 2, "num_experts_per_sublayer": 4, "intermediate_size": 48}
    card = str(make_card("me/cut", "main", fields, None, scores, read_comparison(done)))
    assert "model-index" in card
    assert "## Beside the dense model" in card
    assert "| local_sums " in card


@pytest.mark.parametrize("begins", [(), ("<s>",)])
def test_bits_per_byte_are_those_of_transformers_loss(dense, tmp_path, begins):
    """The loss on the same window, which begins with BOS, and with another if the tokenizer adds one."""
    model = with_tokens_around(dense, tmp_path / "model", *begins, "A")
    text = "It was a dark and stormy night, and so on. " * 2
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": text}) + "\n")
    from finedeep.eval.scoring.local_tasks import write_task

    write_task(tmp_path, "t", "text", tmp_path / "t.jsonl")
    score = scores_of(evaluate(model, ["t"], include_path=tmp_path, device="cpu"))["t", "bits_per_byte", "none"]
    tokenizer, model = AutoTokenizer.from_pretrained(model), LlamaForCausalLM.from_pretrained(model).eval()
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
    assert ids.shape[1] == 1 + len(begins) + len(text) <= 128
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    nats = score.value * math.log(2) * len(text.encode())
    assert nats == pytest.approx(loss * (ids.shape[1] - 1), rel=1e-5)


def slow_model(folder):
    """A model in whose folder a run takes long enough to be stopped in its midst."""
    return make_dense(folder, hidden_size=128, intermediate_size=512, num_hidden_layers=4)


def test_a_killed_run_goes_on_where_it_was(tmp_path, capsys):
    model, questions = slow_model(tmp_path / "model"), tmp_path / "questions"
    questions.mkdir()
    for name in ("a", "b"):
        lines = [{"question": f"{name} {i}?", "choices": ["x" * 60, "y" * 50], "answer": 0} for i in range(24)]
        (questions / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = tmp_path / "out"
    words = ["eval", model, "--local", questions, "--output", output, "--batch-size", "1", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "finedeep_cli", *map(str, words)], stderr=subprocess.PIPE, text=True, env=os.environ
    )
    for line in process.stderr:
        if line.startswith("[1/2] local_a"):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    work = tmp_path / ".out.unfinished"
    assert list(work.rglob("local_a.json"))
    assert not list(output.rglob("results_*.json"))

    assert main(list(map(str, words))) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*map(str, words), "--resume", "--limit", "3"]) == 2
    assert "limit differ" in capsys.readouterr().err

    begin = time.perf_counter()
    assert main([*map(str, words), "--resume"]) == 0
    said = capsys.readouterr().err
    first = said[: said.index("[1/2]")]
    assert "Running loglikelihood requests" not in first, f"asked again, in {time.perf_counter() - begin:.1f} s"
    assert "Running loglikelihood requests" in said
    (results,) = output.rglob("results_*.json")
    whole = scores_of(json.loads(results.read_text()))
    assert not work.exists()
    shutil.rmtree(output)
    assert main([*map(str, words), "--quiet"]) == 0
    (results,) = output.rglob("results_*.json")
    assert scores_of(json.loads(results.read_text())) == whole


@pytest.fixture
def sampling(tmp_path):
    """Two tasks of which each question is asked twice, and the answers are drawn."""
    from finedeep.eval.scoring.local_tasks import write_task

    for name in ("a", "b"):
        lines = [{"question": f"{name} {i}?", "answer": "no"} for i in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        path = write_task(tmp_path, name, "generation", tmp_path / f"{name}.jsonl")
        kept = {"generation_kwargs": {"until": ["\n"], "do_sample": True, "temperature": 1.0, "max_gen_toks": 8}}
        path.write_text(json.dumps({**yaml.safe_load(path.read_text()), **kept, "repeats": 2}))
    return tmp_path


@pytest.mark.parametrize("stopped", [False, True])
def test_what_samples_is_asked_once(monkeypatch, sampling, dense, stopped):
    """And scored by what it said then."""
    from lm_eval.models.huggingface import HFLM

    usual, asked = HFLM.generate_until, []

    def generate_until(self, requests):
        answers = usual(self, requests)
        asked.extend((r.task_name, r.doc_id, answer) for r, answer in zip(requests, answers, strict=True))
        return answers

    def stop(line):
        if line.startswith("[1/2]"):
            raise KeyboardInterrupt

    monkeypatch.setattr(HFLM, "generate_until", generate_until)
    how = {"include_path": sampling, "work": sampling / "work", "device": "cpu"}
    if stopped:
        with pytest.raises(KeyboardInterrupt):
            evaluate(dense, ["a", "b"], say=stop, **how)
        assert len(asked) == 3 * 2
    results = evaluate(dense, ["a", "b"], **how)
    assert len(asked) == len(set(asked)) == 2 * 3 * 2
    for task, samples in results["samples"].items():
        for sample in samples:
            said = [answer for *question, answer in asked if question == [task, sample["doc_id"]]]
            assert sample["resps"] == [said]


@pytest.fixture
def asked(monkeypatch):
    """How many questions the harness has asked each model."""
    from lm_eval.models.huggingface import HFLM

    found = Counter()

    def counting(usual):
        def ask(self, requests):
            found[type(self.model).__name__] += len(requests)
            return usual(self, requests)

        return ask

    for method in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        monkeypatch.setattr(HFLM, method, counting(getattr(HFLM, method)))
    return found


def test_answers_stay_for_other_runs(tmp_path, capsys, dense, cut, converted, questions, asked):
    """One dense model, compared with two: it answers once, and again when it is another one."""
    dense = shutil.copytree(dense, tmp_path / "dense")
    words = ("--baseline", dense, "--local", questions, "--quiet", "--answers", tmp_path / "answers")
    assert command(cut, *words) == 0
    once, table = dict(asked), capsys.readouterr().out
    assert command(converted, *words) == 0
    assert dict(asked) == {**once, "FinedeepForCausalLM": 2 * once["FinedeepForCausalLM"]}
    capsys.readouterr()
    assert command(cut, *words) == 0  # and it is the same table, of no further question
    assert asked.total() == once["LlamaForCausalLM"] + 2 * once["FinedeepForCausalLM"]
    assert capsys.readouterr().out == table
    assert command(cut, *words, "--limit", "5") == 0
    assert asked.total() == once["LlamaForCausalLM"] + 2 * once["FinedeepForCausalLM"]
    os.utime(dense / "model.safetensors", (1, 1))
    assert command(cut, *words) == 0
    assert asked["LlamaForCausalLM"] == 2 * once["LlamaForCausalLM"]


def put(answer_cache, number):
    kept = KeptAnswers(answer_cache.parent / f"work-{number}", ["task"], None, answer_cache)
    for i in range(30):
        kept._put_into_cache("task", {("task", i, number, "hash"): [(-1.0, True)]})


def test_several_runs_put_answers_into_a_cache_at_once(tmp_path):
    runs = [FORKS.Process(target=put, args=(tmp_path / "answer_cache", number)) for number in range(3)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
        assert run.exitcode == 0
    found = KeptAnswers(tmp_path / "work", ["task"], None, tmp_path / "answer_cache").answers("task")
    assert found == {("task", i, number, "hash"): [(-1.0, True)] for i in range(30) for number in range(3)}
    (tmp_path / "answer_cache/task.json").write_text('[["half')
    assert KeptAnswers(tmp_path / "work", ["task"], None, tmp_path / "answer_cache").answers("task") == {}


def test_more_answers_than_there_are_in_the_cache(sampling, dense, asked):
    """A question that is asked twice has two answers, not the same one twice."""
    path = sampling / "a.yaml"
    definition = yaml.safe_load(path.read_text())
    how = {"include_path": sampling, "answers": sampling / "answers", "device": "cpu"}
    for repeats in (1, 3, 3, 2):
        path.write_text(json.dumps({**definition, "repeats": repeats}))
        results = evaluate(dense, ["a"], **how)
    assert asked.total() == 3 * 1 + 3 * 3
    assert [len(sample["resps"][0]) for sample in results["samples"]["a"]] == [2, 2, 2]


def test_an_adapter_that_changes_has_other_answers(tmp_path, dense):
    (tmp_path / "adapter_config.json").write_text("{}")
    before = identity_of(dense, {"peft": str(tmp_path)})
    assert before == identity_of(dense, {"peft": str(tmp_path)})
    assert before != identity_of(dense, {})
    (tmp_path / "adapter_config.json").write_text('{"r": 2}')
    assert before != identity_of(dense, {"peft": str(tmp_path)})


def test_a_cache_that_cannot_be_made(tmp_path, capsys, dense, questions):
    (tmp_path / "answers").touch()
    assert command(dense, "--local", questions, "--answers", tmp_path / "answers") == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'answers'}" in said
    assert "cannot be made" in said
    assert "Traceback" not in said


PLAN = """
import json
from finedeep.eval.evaluation import plan_of
print(json.dumps(plan_of({"dense": "org/dense"}, [], None, {})))
"""


@pytest.mark.slow  # three processes
def test_a_hub_model_that_changes_makes_another_run(tmp_path):
    """Over real HTTP. Of a Hub id a run keeps the commit, though the id is the same."""

    def plan():
        command = [sys.executable, "-c", PLAN]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    with running_hub() as (hub, environment):
        environment = {**os.environ, **environment, "HF_HOME": str(tmp_path)}
        hub.repositories["org/dense"] = [{"config.json": b'{"model_type": "llama"}'}]
        before, again = plan(), plan()
        hub.repositories["org/dense"].append({"config.json": b'{"model_type": "llama", "vocab_size": 3}'})
        hub.branches["org/dense", "main"] = 1
        after = plan()
    assert before == again
    assert {name for name in before if before[name] != after[name]} == {"files of dense"}


def test_memory_that_runs_out_halves_the_batch(monkeypatch, capsys, dense, questions):
    usual = LlamaForCausalLM.forward

    def forward(self, input_ids, **kwargs):
        if len(input_ids) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return usual(self, input_ids, **kwargs)

    wanted = scores_of(evaluate(dense, ["local_sums"], include_path=made(questions), device="cpu"))
    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    said = []
    how = {"include_path": made(questions), "device": "cpu", "say": said.append}
    assert scores_of(evaluate(dense, ["local_sums"], batch_size=16, **how)) == wanted
    assert [line for line in said if "memory" in line] == [
        "memory has run out with 16 sequences in a batch; going on with 8",
        "memory has run out with 8 sequences in a batch; going on with 4",
        "memory has run out with 4 sequences in a batch; going on with 2",
    ]

    def never(self, input_ids, **kwargs):
        return forward(self, input_ids.T, **kwargs)  # of any prompt that is longer than three tokens

    monkeypatch.setattr(LlamaForCausalLM, "forward", never)
    with pytest.raises(EvaluationError, match=r"not enough memory for .* smaller --dtype"):
        evaluate(dense, ["local_sums"], batch_size=1, **how)
    monkeypatch.setattr("finedeep.eval.scoring.harness._check_logits", lambda *a: None)
    with pytest.raises(EvaluationError, match=r"memory has run out with 1 sequences.*smaller --batch-size"):
        evaluate(dense, ["local_sums"], batch_size=1, **how)


def made(questions):
    from finedeep.eval.scoring.local_tasks import write_local_tasks

    write_local_tasks(questions, questions / "tasks", byte_tokenizer())
    return questions / "tasks"


def test_a_model_of_nan_is_refused(tmp_path, capsys, questions):
    model = random_model()
    with torch.no_grad():
        model.model.layers[1].sublayers[0].down_proj.weight[:, 3] = float("nan")
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert command(tmp_path, "--local", questions) == 2
    assert "NaN for logits in torch.float32" in capsys.readouterr().err


def test_tokenizers_that_differ_are_named(tmp_path, capsys, dense, converted, questions):
    other = shutil.copytree(converted, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    assert command(other, "--baseline", dense, "--local", questions) == 2
    said = capsys.readouterr().err
    assert "259 and 260 tokens; '<new>' is None and 259" in said
    assert "only models with the same one can be compared" in said


def with_tokens_around(model, folder, *single):
    """A copy whose tokenizer puts special tokens around the sequence A."""
    copy = shutil.copytree(model, folder)
    path = copy / "tokenizer.json"
    content = json.loads(path.read_text())
    ids = {"<s>": 256, "</s>": 257}
    parts = [{"Sequence" if x == "A" else "SpecialToken": {"id": x, "type_id": 0}} for x in single]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": parts,
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {x: {"id": x, "ids": [ids[x]], "tokens": [x]} for x in single if x != "A"},
    }
    path.write_text(json.dumps(content))
    return copy


def test_a_tokenizer_that_only_one_model_begins_with_is_named(tmp_path, converted, dense):
    other = with_tokens_around(converted, tmp_path / "other", "<s>", "A")
    with pytest.raises(EvaluationError, match=r"from token 0 of 'Once upon .* \['O'.* and \['<s>', 'O'"):
        check_same_tokenizer(dense, other)
    said = (
        "Contexts begin with <s>, as the tokenizer has it; texts scored as a whole begin with <s> <s>, as the harness"
    )
    assert check_same_tokenizer(other, other).startswith(said)


def test_a_tokenizer_that_ends_texts_is_refused(tmp_path, capsys, dense, questions):
    other = with_tokens_around(dense, tmp_path / "other", "<s>", "A", "</s>")
    assert command(other, "--local", questions) == 2
    assert "puts </s> at the end of a text" in capsys.readouterr().err


def test_a_tokenizer_without_bos_and_eos_is_refused(tmp_path, capsys, dense, questions):
    other = shutil.copytree(dense, tmp_path / "other")
    path = other / "tokenizer_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in fields.items() if k not in ("bos_token", "eos_token")}))
    (other / "special_tokens_map.json").unlink(missing_ok=True)
    assert command(other, "--local", questions) == 2
    assert "neither BOS nor EOS" in capsys.readouterr().err


@pytest.fixture(scope="module")
def manager():
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(SUITE))


def test_the_suite_is_made_of_the_harness_tasks(manager):
    assert "finedeep_suite" in manager.all_groups

    def leaves(members):
        for member in members:
            yield from leaves(member["task"]) if "group" in member else [(member["task"], member["num_fewshot"])]

    found = dict(leaves(manager.task_index["finedeep_suite"].cfg["task"]))
    assert set(found) <= set(manager.all_subtasks)
    choices = ["arc_easy", "arc_challenge", "hellaswag", "piqa", "social_iqa", "winogrande"]
    answers = ["nq_open", "triviaqa"]
    assert list(found) == [*choices, *answers, "lambada_openai", "squad_completion", "wikitext"]
    assert {task for task, shots in found.items() if shots} == set(answers)


@pytest.fixture
def one_index(monkeypatch, manager):
    """Reading the harness's own definitions once will do."""
    usual = type(manager)

    def index(include_defaults=True, **kwargs):
        return manager if include_defaults else usual(include_defaults=False, **kwargs)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", index)


def test_an_unknown_task_has_its_nearest_names(capsys, one_index, converted):
    assert command(converted, "--tasks", "arc_eazy") == 2
    assert re.search(r"no task 'arc_eazy' \(nearest: .*arc_easy", capsys.readouterr().err)


def test_tasks_whose_file_has_no_suffix_are_let_pass(manager):
    names = {"arc_multilingual", "hellaswag_multilingual", "acp_bench", "bigbench_generate_until"}
    assert names <= set(manager.all_tasks)
    check_tasks(names, None)


def test_a_suite_without_network_says_where_the_data_come_from(capsys, one_index, converted):
    assert command(converted, "--tasks", "finedeep_suite") == 2
    said = capsys.readouterr().err
    assert re.search(r"data of finedeep_suite cannot be loaded .* --local", said)


def tiny(**rows):
    """A stand-in for `ConfigurableTask.download`: some rows of the task's own kind, wherever it looks for them."""

    def download(self, *arguments, **more):
        row = rows[self.config.task if isinstance(self.config.task, str) else "squad_completion"]
        split = datasets.Dataset.from_list([{**row, "row": i} for i in range(8)])
        self.dataset = datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), split))

    return download


def test_the_whole_suite_on_rows_of_each_kind(capsys, monkeypatch, one_index, dense, converted):
    """The harness's own definitions, its prompts, filters and averages; only the data are made up."""
    arc = {"question": "Sky?", "choices": {"text": ["blue", "red"], "label": ["A", "B"]}, "answerKey": "B"}
    swag = {"activity_label": "Run", "ctx_a": "He runs.", "ctx_b": "he", "endings": ["a", "b", "c", "d"], "label": "2"}
    social = {"context": "Ann ate.", "question": "Why?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "1"}
    rows = {
        "arc_easy": arc,
        "arc_challenge": arc,
        "hellaswag": swag,
        "piqa": {"goal": "Open it", "sol1": "pull", "sol2": "push", "label": 1},
        "social_iqa": social,
        "winogrande": {"sentence": "A cat saw _ run.", "option1": "Tom", "option2": "Ann", "answer": "1"},
        "nq_open": {"question": "who", "answer": ["me"]},
        "triviaqa": {"question": "who", "answer": {"aliases": ["me"], "value": "me"}},
        "lambada_openai": {"text": "once upon a time"},
        "squad_completion": {"text": "It is", "value": "so"},
        "wikitext": {"page": "A page of words."},
    }
    monkeypatch.setattr("lm_eval.api.task.ConfigurableTask.download", tiny(**rows))
    assert (
        command(
            converted, "--baseline", dense, "--tasks", "finedeep_suite", "--max-length", 512, "--limit", 2, "--quiet"
        )
        == 0
    )
    printed = capsys.readouterr().out
    for task in rows:
        assert re.search(rf"^{task}: (identical|not distinguishable)", printed, re.MULTILINE), task
    for group, metric in (("finedeep_suite::choice", "acc"), ("finedeep_suite::answer", r"exact_match \(remove_w")):
        assert re.search(rf"^\| {group} +\| {metric}.* \+0.0000 .*\|", printed, re.MULTILINE), printed


def test_nothing_to_score(capsys, converted):
    assert command(converted) == 2
    assert "--tasks" in capsys.readouterr().err


def test_a_text_without_a_baseline(capsys, converted, questions):
    assert command(converted, "--local", questions, "--text", questions / "story.txt") == 2
    assert "finedeep inspect" in capsys.readouterr().err


def test_what_goes_wrong_after_scoring_does_not_lose_the_scores(tmp_path, capsys, monkeypatch, dense, cut, questions):
    def broken(*arguments, **more):
        raise RuntimeError("no /proc here")

    monkeypatch.setattr(cost, "peak_memory", broken)
    monkeypatch.setattr(cost, "SECONDS", 0.01)
    words = ["--baseline", dense, "--local", questions, "--output", tmp_path / "out", "--limit", 2, "--quiet"]
    assert command(cut, *words) == 0
    assert "cost: not measured (RuntimeError: no /proc here)" in capsys.readouterr().out
    assert "local_sums" in (tmp_path / "out/report.html").read_text()
    assert "cost" not in json.loads((tmp_path / "out/comparison.json").read_text())


def test_results_that_cannot_be_written_leave_the_answers(tmp_path, capsys, dense, questions):
    model = shutil.copytree(dense, tmp_path / "/".join(["deep" * 20] * 4))  # the harness makes one name of it
    out = tmp_path / "out"
    assert command(model, "--local", questions, "--limit", 2, "--output", out) == 2
    assert "could not be written" in capsys.readouterr().err
    assert list((tmp_path / ".out.unfinished/model").glob("answers-*"))


def test_results_of_a_folder_here_are_not_hidden_and_never_mixed(tmp_path, capsys, monkeypatch, dense, questions):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(dense, tmp_path / "llama")
    words = ["./llama", "--local", questions, "--limit", 2, "--output", "out", "--quiet"]
    assert command(*words) == 0
    (old,) = tmp_path.glob("out/llama/results_*.json")
    listed = json.loads((tmp_path / "out/finedeep_results.json").read_text())["files"]
    assert sorted(listed) == sorted(p.relative_to("out").as_posix() for p in Path("out").rglob("*") if p.is_file())
    assert not [path for path in tmp_path.rglob(".*") if path.name.startswith(".")]
    capsys.readouterr()
    assert command("./another", *words[1:]) == 2
    assert (
        "out is not empty: it holds a finished run. --overwrite replaces it; --resume is for" in capsys.readouterr().err
    )
    (tmp_path / "out/notes.txt").write_text("mine")
    assert command(*words, "--overwrite") == 2
    assert "notes.txt is on no finished run's list" in capsys.readouterr().err
    assert old.exists()
    (tmp_path / "out/notes.txt").unlink()
    assert command(*words, "--overwrite") == 0
    (new,) = tmp_path.glob("out/llama/results_*.json")
    assert new.name != old.name


@pytest.mark.parametrize(
    ("model", "name"),
    [("./llama", "llama"), ("../models/llama", "models/llama"), ("org/llama", "org/llama"), (".hidden/x", "hidden/x")],
)
def test_names_of_results(model, name):
    assert name_of(model) == name


def test_answers_of_nobody_knows_which_model_are_neither_used_nor_removed(tmp_path, capsys, questions):
    answers = tmp_path / ".out.unfinished/model/answers-0_rank0.db"
    answers.parent.mkdir(parents=True)
    answers.write_text("not even a database")
    assert command("any", "--local", questions, "--output", tmp_path / "out", "--overwrite") == 2
    assert ".out.unfinished holds model/answers-0_rank0.db, and no plan.json" in capsys.readouterr().err
    assert answers.read_text() == "not even a database"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--set", "pretrained=x"], "pretrained is no argument of the harness"),
        (["--set", "nothing=1"], "cannot be loaded as a causal language model"),
        (["--resume"], "--output"),
    ],
)
def test_options_that_cannot_be_met(capsys, dense, questions, options, said):
    assert command(dense, "--local", questions, *options) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--num-fewshot", "x"], ["--seed", "-1"], ["--device", "gpu"]])
def test_options_of_no_such_kind(capsys, options):
    with pytest.raises(SystemExit):
        main(["eval", "any", "--tasks", "any", *options])
    assert options[1] in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named(tmp_path, capsys, dense, questions):
    model = shutil.copytree(dense, tmp_path / "model")
    with (model / "model.safetensors").open("r+b") as file:
        file.truncate(2000)
    assert command(model, "--local", questions) == 2
    assert re.fullmatch(
        r"finedeep: error: \S+/model cannot be loaded .*\n", capsys.readouterr().err.splitlines(True)[-1]
    )


def test_a_comparison_older_than_other_results_is_not_for_the_card(tmp_path, done):
    folder = shutil.copytree(done, tmp_path / "results")
    later = folder / "results_later.json"
    later.write_text(json.dumps({"results": {"other": {"alias": "other", "acc,none": 0.5}}}))
    os.utime(later, (time.time() + 60, time.time() + 60))
    assert [score.dataset_type for score in read_scores(folder)] == ["other"]
    assert read_comparison(folder) is None


@pytest.mark.slow
def test_two_processes_say_it_once(tmp_path, dense, cut, questions):
    words = ["-m", "finedeep_cli", "eval", cut, "--baseline", dense, "--local", questions, "--output", tmp_path / "out"]
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run([*launch, *map(str, words)], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("\nlocal_sums: ") == 1  # the verdict; a note on few samples names the task too
    assert len(list((tmp_path / "out").rglob("results_*.json"))) == 2


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
@pytest.mark.parametrize("width", [360, 1400])
def test_the_page_in_a_browser(tmp_path, done, width):
    """It scrolls by its tables alone, and the columns that are looked for first are on the screen."""
    page = done / "report.html"
    (seen,) = look([page], width, tmp_path)
    assert seen["scroll"] <= width
    assert seen["images"] == seen["drawn"] == page.read_text().count("<img") >= 3
    assert max(seen["columns"][name] for name in ("finedeep", "difference", "verdict", "ratio")) <= width
