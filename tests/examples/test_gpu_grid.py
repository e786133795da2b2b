"""A ranked list of trainings before a deadline: whatever ends a run or the script, its curve so far is there."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
import yaml
from finedeep.demo.world import World

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
import gpu_grid  # noqa: E402
from recipe import read_recipe, runs_of  # noqa: E402

# In place of a training: a step each 20 ms, as many as the recipe has. What it does else, the learning rate says.
STAND_IN = f"""
import json, os, signal, sys, time
sys.path.insert(0, {str(ROOT / "examples")!r})
from pathlib import Path
from recipe import read_recipe, without_folders
changes = [word.removeprefix("--set=") for word in sys.argv[4:]]
recipe, out = read_recipe(Path(sys.argv[1]), changes), Path(sys.argv[2])
rate = recipe["training"]["learning_rate"]
with (out / "log.jsonl").open("w", buffering=1) as log:
    log.write(json.dumps({{"recipe": without_folders(recipe)}}) + "\\n")
    for step in range(1, recipe["training"]["max_steps"] + 1):
        time.sleep(0.02)
        line = {{"step": step, "eval_held_out_loss": 5 - step / 100, "tokens": step, "seconds": 1}}
        line["at"] = time.monotonic()
        log.write(json.dumps(line) + "\\n")
        if step == 5 and rate == 0.2:
            sys.exit("something is wrong here")
        if step == 5 and rate == 0.3:
            log.write('{{"step": 6, "eval_')
            log.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    log.write(json.dumps({{"nsar": {{"0.1": 0.5}}}}) + "\\n")
"""


@pytest.fixture
def grid(tmp_path, monkeypatch):
    (tmp_path / "plain.py").write_text(STAND_IN)
    (tmp_path / "prepare.py").write_text("")
    monkeypatch.setattr(gpu_grid, "HERE", tmp_path)
    monkeypatch.setattr(gpu_grid, "LOOK", 0.02)
    monkeypatch.setattr(gpu_grid, "WRITE", 0.1)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    yield tmp_path / "grid.yaml"
    for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
        signal.signal(number, handler)


def written(path, rates, steps=10):
    """A grid of one model with some learning rates."""
    recipe = ROOT / "examples/recipes/books-31m.yaml"
    sizes = {"s": {"llama": {"training.max_steps": steps}}}
    runs = [{"size": "s", "models": ["dense"], "learning_rates": rates}]
    path.write_text(
        yaml.safe_dump({"recipe": str(recipe), "sizes": sizes, "models": {"dense": {"model": "llama"}}, "runs": runs})
    )


def run(monkeypatch, grid, *words):
    """The lines that it writes, by learning rate."""
    out = grid.with_name("out.jsonl")
    texts = ["--train", str(grid), "--author", str(grid)]
    monkeypatch.setattr(sys, "argv", ["x", str(grid), str(out), *texts, *map(str, words)])
    gpu_grid.main()
    return lines_of(out)


def lines_of(out):
    lines = map(json.loads, out.read_text().splitlines())
    return {line["recipe"]["training"]["learning_rate"]: line for line in lines}


def times(line):
    return line["log"][0]["at"], line["log"][-1]["at"]


def test_runs_go_in_their_order_some_at_a_time(monkeypatch, grid):
    written(grid, [0.5, 0.1, 0.4])
    lines = run(monkeypatch, grid, "--processes", 2)
    assert list(lines) == [0.5, 0.1, 0.4]
    assert all(line["finished"] and line["nsar"] == {"0.1": 0.5} for line in lines.values())
    (a, a_end), (b, b_end), (c, _) = map(times, lines.values())
    assert max(a, b) < min(a_end, b_end) < c


def test_runs_that_are_not_chosen_keep_their_lines(monkeypatch, grid):
    written(grid, [0.5, 0.1], steps=3)
    before = run(monkeypatch, grid)
    assert list(run(monkeypatch, grid, "--only", "s/dense/0.1-0")) == [0.5, 0.1]
    grid.with_name("out.jsonl").write_text(json.dumps(before[0.5]) + "\n")
    after = run(monkeypatch, grid, "--only", "s/dense/0.1-0")
    assert (after[0.5], after[0.1]["finished"]) == (before[0.5], True)


def test_at_the_deadline_curves_are_kept_and_the_same_command_goes_on(monkeypatch, grid):
    written(grid, [0.5], steps=3)
    run(monkeypatch, grid)
    written(grid, [0.5, 0.1], steps=3)
    slow = grid.with_name("plain.py")
    slow.write_text(STAND_IN.replace("sleep(0.02)", "sleep(3 if step > 2 else 0.02)"))
    lines = run(monkeypatch, grid, "--deadline", 3)
    assert [line["finished"] for line in lines.values()] == [True, False]
    assert len(lines[0.1]["log"]) == 2
    first = times(lines[0.5])
    slow.write_text(STAND_IN)
    lines = run(monkeypatch, grid)
    assert all(line["finished"] for line in lines.values())
    assert times(lines[0.5]) == first  # not made again


def test_runs_that_fail_or_are_killed_keep_their_curves_and_disturb_no_other(monkeypatch, grid):
    written(grid, [0.2, 0.3, 0.1])
    with pytest.raises(SystemExit, match=r"0\.2-0 failed: something is wrong here\n.*0\.3-0 failed: ended by signal 9"):
        run(monkeypatch, grid, "--processes", 1)
    lines = lines_of(grid.with_name("out.jsonl"))
    assert [line["finished"] for line in lines.values()] == [False, False, True]
    assert [len(line["log"]) for line in lines.values()] == [5, 5, 10]
    assert "something is wrong" in lines[0.2]["failure"]


def test_a_killed_script_leaves_what_there_is(monkeypatch, grid):
    """Written every WRITE seconds; here it is looked at while runs continue."""
    written(grid, [0.5], steps=100)
    seen = []
    real = gpu_grid.Grid.write

    def write(self):
        real(self)
        seen.append(len(lines_of(self.out).get(0.5, {"log": []})["log"]))

    monkeypatch.setattr(gpu_grid.Grid, "write", write)
    run(monkeypatch, grid)
    assert seen == sorted(seen)
    assert len({n for n in seen if 0 < n < 100}) > 3


def test_lines_of_another_recipe_are_not_mixed(monkeypatch, grid):
    written(grid, [0.5])
    run(monkeypatch, grid)
    with pytest.raises(SystemExit, match="name another file"):
        run(monkeypatch, grid, "--tokens", 64 * 512 * 7)


def test_a_length_in_tokens(monkeypatch, grid):
    written(grid, [0.5])
    line = run(monkeypatch, grid, "--tokens", 64 * 512 * 20 + 5)[0.5]
    assert line["recipe"]["training"] | {"max_steps": 20, "eval_steps": 2} == line["recipe"]["training"]
    assert len(line["log"]) == 20


def test_texts_that_cannot_be_prepared_end_it(monkeypatch, grid):
    written(grid, [0.5], steps=1000)
    grid.with_name("prepare.py").write_text("import sys; sys.exit('no such text')")
    with pytest.raises(SystemExit, match="could not be prepared: no such text"):
        run(monkeypatch, grid)


@pytest.mark.parametrize(
    ("words", "said"), [(["--only", "dense"], "names are SIZE/MODEL/RATE-SEED"), ([], "name the texts")]
)
def test_bad_words_are_refused(monkeypatch, grid, capsys, words, said):
    written(grid, [0.5])
    more = ["--train", "t", "--author", "a"] if words else []
    monkeypatch.setattr(sys, "argv", ["x", str(grid), str(grid.with_name("out.jsonl")), *more, *words])
    with pytest.raises(SystemExit):
        gpu_grid.main()
    assert said in capsys.readouterr().err


def test_the_shipped_grid_begins_with_what_answers_most():
    """At the rate that was best for both: dense, its control, the two that Finedeep is, and the best idea."""
    path = ROOT / "examples/gpu_grid.yaml"
    runs = dict(runs_of(yaml.safe_load(path.read_text())))
    assert list(runs)[:10] == [
        "31m/dense/0.0015-0",
        "31m/dense-sandwich-norm/0.0015-0",
        "31m/m-2-k-8-sandwich-norm/0.0015-0",
        "31m/m-1-k-16-sandwich-norm/0.0015-0",
        "31m/m-1-k-16-sandwich-norm-normed-scores/0.0015-0",
        "31m/m-2-k-8-sandwich-norm-normed-scores/0.0015-0",
        "31m/dense-sandwich-norm/0.003-0",
        "31m/m-2-k-8-sandwich-norm/0.003-0",
        "31m/m-1-k-16-sandwich-norm/0.003-0",
        "31m/m-2-k-8-sandwich-norm-constant-gates/0.0015-0",
    ]
    for changes in runs.values():
        recipe = read_recipe(path.parent / "recipes/books-31m.yaml", gpu_grid.words_of(changes))
        assert recipe["training"]["max_steps"] % recipe["training"]["eval_steps"] == 0


@pytest.mark.slow  # processes that import torch
def test_two_runs_by_real_processes_one_of_them_killed(tmp_path):
    texts = "\n".join(islice(World.from_seed(0).texts(0), 1500))
    (tmp_path / "train.txt").write_text(texts)
    (tmp_path / "author.txt").write_text(texts[:20000])
    tiny = {"tokenizer.vocabulary": 300, "data.context": 32, "data.validation_sequences": 10}
    tiny |= {"data.held_out_documents": 5, "sizes.hidden_size": 32, "sizes.intermediate_size": 64}
    tiny |= {"sizes.num_hidden_layers": 2, "sizes.num_attention_heads": 2, "sizes.num_key_value_heads": 2}
    tiny |= {"training.per_device_train_batch_size": 4, "training.max_steps": 60, "training.eval_steps": 10}
    grid = {
        "recipe": str(ROOT / "examples/recipes/books-31m.yaml"),
        "sizes": {"tiny": {"llama": tiny, "finedeep": tiny}},
        "models": {"dense": {"model": "llama"}, "M=2 K=8": {"finedeep.sublayer_output_norm": True}},
        "runs": [{"size": "tiny", "models": ["dense", "M=2 K=8"], "learning_rates": [0.004]}],
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    out = tmp_path / "out.jsonl"
    words = [sys.executable, ROOT / "examples/gpu_grid.py", tmp_path / "grid.yaml", out]
    words += ["--train", tmp_path / "train.txt", "--author", tmp_path / "author.txt", "--processes", "2"]
    process = subprocess.Popen(list(map(str, words)), env={**os.environ, "OMP_NUM_THREADS": "1"})
    log = tmp_path / ".out.work/runs/tiny/dense/0.004-0/log.jsonl"
    while not log.exists() or log.read_text().count("\n") < 2:
        assert process.poll() is None
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    dense = [pid for pid in children if "/dense/" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(int(dense[0]), signal.SIGKILL)
    assert process.wait(timeout=300) == 1
    lines = {line["recipe"]["model"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert not lines["llama"]["finished"]
    assert lines["llama"]["log"]
    assert lines["finedeep"]["finished"]
    assert lines["finedeep"]["log"][-1]["eval_author_loss"] < lines["finedeep"]["log"][0]["eval_author_loss"]
    assert 0 < lines["finedeep"]["gate_mean"] < 2
    subprocess.run(list(map(str, words)), check=True)
    again = {line["recipe"]["model"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert again["llama"]["finished"]
    assert again["finedeep"] == lines["finedeep"]
