"""Training from random weights, many models side by side: the shuffled text, the grid, the tables."""

import json
import math
import random
import statistics
import sys
import time
from itertools import islice, pairwise
from pathlib import Path
from threading import Lock

import pytest
import torch
import yaml
from finedeep.demo.world import World
from finedeep.eval.report.cost import flops

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))
import grid  # noqa: E402
import mix  # noqa: E402
import pretrain  # noqa: E402
import recipe as recipes  # noqa: E402
import results  # noqa: E402


def run(monkeypatch, module, *words):
    monkeypatch.setattr(sys, "argv", ["x", *map(str, words)])
    module.main()


@pytest.fixture
def ordered(tmp_path):
    path = tmp_path / "ordered.txt"
    path.write_text("\n".join(f"line {i} " + "x" * random.Random(i).randrange(90) for i in range(2000)))
    return path


def test_a_mixed_text_has_every_line_once(monkeypatch, tmp_path, ordered):
    out, held = tmp_path / "out.txt", tmp_path / "held.txt"
    run(monkeypatch, mix, ordered, out, "--held-out", held, "--held-out-pieces", "7", "--characters", "300")
    mixed, kept = out.read_text().splitlines(), held.read_text().splitlines()
    assert sorted(mixed + kept) == sorted(ordered.read_text().splitlines())
    assert 7 * 4 < len(kept) < 7 * 40
    numbers = [int(line.split()[1]) for line in mixed]
    assert abs(statistics.correlation(numbers, range(len(numbers)))) < 0.2
    together = sum(b == a + 1 for a, b in pairwise(numbers))
    assert together > 0.5 * len(numbers)  # pieces stay whole


def test_a_mixed_text_is_that_of_its_seed(monkeypatch, tmp_path, ordered):
    made = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(monkeypatch, mix, ordered, tmp_path / name, "--seed", seed)
        made[name] = (tmp_path / name).read_text()
    assert made["a"] == made["b"] != made["c"]


def test_more_pieces_than_there_are_cannot_be_held_out(monkeypatch, tmp_path, capsys, ordered):
    with pytest.raises(SystemExit):
        run(monkeypatch, mix, ordered, tmp_path / "out", "--held-out", tmp_path / "held", "--held-out-pieces", "900")
    assert "cannot be held out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def log(size, model, rate, seed, held_out, author=(4.0, 4.0), parameters=1000, flops=2000.0, nsar=0.5):
    """A run's log, as examples/grid.py keeps it, with losses after 100 and 200 tokens."""
    recipe = {"model": model, "training": {"learning_rate": rate, "seed": seed}}
    lines = [{"recipe": recipe, "parameters": parameters, "flops_per_token": flops}]
    for tokens, *losses in zip((100, 200), held_out, author, strict=True):
        names = ("eval_held_out_loss", "eval_author_loss")
        lines += [{"tokens": tokens, name: loss} for name, loss in zip(names, losses, strict=True)]
    lines.append({"nsar": {"0.1": nsar}, "histogram": [seed, 1, 2]})
    return f"{size}/{model}/{rate:g}-{seed}.jsonl", "\n".join(map(json.dumps, lines))


def groups_of(folder, made):
    """As `results` reads them from logs, each a name and a text."""
    for name, text in made:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return results.groups_of(results.read(path) for path in sorted(folder.glob("*/*/*.jsonl")))


@pytest.fixture
def groups(tmp_path):
    made = [log("s", "dense", 0.01, seed, (5, 3.0 + seed / 10)) for seed in (0, 1, 2)]
    made += [log("s", "dense", 0.02, 0, (5, 3.5))]
    made += [log("s", "deep", 0.02, seed, (5, 2.9 + seed / 5), parameters=1010, nsar=0.75) for seed in (0, 1)]
    return groups_of(tmp_path, made)


def test_the_rate_that_counts_is_the_best_one(groups):
    dense = groups["s", "dense"]
    assert dense.tried == {0.01: pytest.approx(3.1), 0.02: 3.5}
    assert [run.loss() for run in dense.runs.values()] == [3.0, 3.1, 3.2]


def test_two_rates_are_compared_over_the_seeds_of_both(tmp_path):
    """Though a third one has fewer, and the loss of its seed would order them otherwise."""
    losses = {0.01: (3.0, 3.4), 0.02: (3.2, 3.0), 0.04: (3.3,)}
    made = [log("s", "dense", rate, i, (5, loss)) for rate, seeds in losses.items() for i, loss in enumerate(seeds)]
    group = groups_of(tmp_path, made)["s", "dense"]
    assert group.first_run.rate == 0.02
    assert group.mean() == pytest.approx(3.1)


def test_rates_stand_side_by_side(groups):
    table = results.rates_of_models(groups, {"size": "s", "models": ["dense", "deep"]})
    head, _, dense, deep = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert dict(zip(head, dense, strict=True)) == {
        "model": "dense",
        "seeds": "1",
        "loss at 0.01": "3.000",
        "loss at 0.02": "3.500",
        "NSAR at 0.01": "50.0 %",
        "NSAR at 0.02": "50.0 %",
    }
    deep = dict(zip(head, deep, strict=True))
    assert [deep[column] for column in ("seeds", "loss at 0.01", "loss at 0.02")] == ["2", "", "3.000"]


def test_a_row_compares_with_the_first_by_seeds_that_both_have(groups):
    table = results.tables_of(groups, {"here": {"sizes": ["s"], "models": ["dense", "deep"]}})["here"]
    head, _, dense, deep = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    row = dict(zip(head, deep, strict=True))
    assert row["parameters"] == "1,010 (+1.00 %)"
    assert row["loss"] == "3.000 (2.900 to 3.100)"
    mean = ((2.9 - 3.0) + (3.1 - 3.1)) / 2
    assert row["perplexity"] == f"{100 * (math.exp(mean) - 1):+.1f} %"
    assert row["NSAR"] == "75.0 %"
    assert dict(zip(head, dense, strict=True))["perplexity"] == ""


def test_the_claim_is_beside_the_best_dense_model(groups):
    said = results.claim_of(groups, {"sizes": ["s"], "model": "deep", "dense": ["dense", "not there"]})
    over = math.exp((2.9 + 3.1) / 2 - (3.0 + 3.1 + 3.2) / 3) - 1
    assert f"the perplexity of deep is {-100 * over:.1f} % below the best dense model's" in said
    assert "(loss 3.000 against 3.100, lower with 1 of 2 seeds); NSAR 75 % against 50 %." in said
    worse = results.claim_of(groups, {"sizes": ["s"], "model": "dense", "dense": ["deep"]})
    assert f"{100 * (math.exp(0.1) - 1):.1f} % above" in worse


def test_a_histogram_is_of_all_seeds(monkeypatch, groups):
    drawn = {}
    monkeypatch.setattr(results, "activations", drawn.update)
    results.histograms(groups, {"size": "s", "models": ["dense", "deep"]})
    assert {name: found["histogram"] for name, found in drawn.items()} == {"dense": [3, 3, 6], "deep": [1, 2, 4]}


def test_rates_without_a_common_seed_cannot_be_compared(tmp_path):
    made = [log("s", "dense", 0.01, 0, (5, 3)), log("s", "dense", 0.02, 1, (5, 3))]
    with pytest.raises(SystemExit, match="no seed in common"):
        groups_of(tmp_path, made)


@pytest.fixture(scope="module")
def whole_grid():
    return yaml.safe_load((EXAMPLES / "grid.yaml").read_text())


class Words:
    """Of a tokenizer what a model's config is made of."""

    bos_token_id, eos_token_id, pad_token_id = 0, 1, 1

    def __len__(self):
        return 1024


def built(whole_grid, changes):
    recipe = yaml.safe_load((EXAMPLES / whole_grid["recipe"]).read_text())
    sets = [f"{name}={json.dumps(value)}" for name, value in changes.items()]
    return pretrain.model_of(pretrain.changed(recipe, sets), Words())


def test_models_that_are_compared_are_of_one_size(whole_grid):
    """Parameters within 0.5 %, FLOPs within 1 %, but for what is said here: norms, routers, more layers' attention."""
    parameters_apart = dict.fromkeys(("m-4-k-4", "m-4-k-1", "m-2-k-8-sandwich-norm"), 0.006)
    parameters_apart |= {"m-4-k-4-sandwich-norm": 0.009, "m-8-k-2": 0.009, "m-16-k-1": 0.015, "m-4-k-16": 0.043}
    flops_apart = {"0.3m/dense-more-layers": 0.09}
    flops_apart |= dict.fromkeys(("0.1m-3x/m-4-k-4", "0.1m-3x/m-2-k-8-sandwich-norm"), 0.017)
    sizes, ids = {}, torch.zeros(1, 128, dtype=torch.long)
    for name, changes in recipes.runs_of(whole_grid):
        place = name.rsplit("/", 1)[0]
        if place not in sizes:
            model = built(whole_grid, changes)
            sizes[place] = (model.num_parameters(), flops(model, ids))
    for place, (parameters, operations) in sizes.items():
        size, model = place.split("/")
        base = sizes[f"{size}/dense"]
        assert parameters / base[0] == pytest.approx(1, abs=parameters_apart.get(model, 0.005)), place
        assert operations / base[1] == pytest.approx(1, abs=flops_apart.get(place, 0.01)), place


def test_every_model_in_a_table_is_trained(whole_grid):
    trained = {name.split("/")[1] for name, _ in recipes.runs_of(whole_grid)}
    shown = [*whole_grid["tables"].values(), *(whole_grid[name] for name in ("rates", "curves", "histograms"))]
    named = [model for table in shown for model in table["models"]]
    assert {recipes.slug(model) for model in named} <= trained
    assert set(whole_grid["models"]) >= set(named)


def test_every_run_has_a_name_of_its_own(whole_grid):
    names = [name for name, _ in recipes.runs_of(whole_grid)]
    assert len(names) == len(set(names)) > 20
    assert len({recipes.slug(model) for model in whole_grid["models"]}) == len(whole_grid["models"])


def test_the_page_is_that_of_the_committed_logs(monkeypatch, tmp_path):
    """All tables and figures, byte for byte."""
    page = tmp_path / "RESULTS.md"
    drawn = {"CURVES": tmp_path / "curves.svg", "HISTOGRAMS": tmp_path / "activations.svg"}
    page.write_text(results.PAGE.read_text())
    monkeypatch.setattr(results, "PAGE", page)
    for name, path in drawn.items():
        monkeypatch.setattr(results, name, path)
    results.main()
    assert page.read_text() == (EXAMPLES / "RESULTS.md").read_text()
    for path in drawn.values():
        assert path.read_bytes() == (EXAMPLES / path.name).read_bytes()


def test_the_logs_are_of_the_grid_and_name_no_folder(whole_grid):
    names = {f"{name}.jsonl" for name, _ in recipes.runs_of(whole_grid)}
    found = {str(path.relative_to(results.LOGS)): path for path in results.LOGS.glob("*/*/*.jsonl")}
    assert found.keys() == names
    for path in found.values():
        recipe = json.loads(path.read_text().splitlines()[0])["recipe"]
        assert "/" not in json.dumps([recipe["data"], recipe["tokenizer"]])


def test_a_name_that_no_run_has_is_refused(monkeypatch, tmp_path, capsys):
    words = [EXAMPLES / "grid.yaml", tmp_path, "--train", "t", "--held-out", "h", "--author", "a", "--only", "dense"]
    with pytest.raises(SystemExit):
        run(monkeypatch, grid, *words)
    assert "names are SIZE/MODEL/RATE-SEED" in capsys.readouterr().err


def test_models_are_looked_into_one_at_a_time(monkeypatch, tmp_path):
    """Two threads that load models at once disturb each other, now and then."""
    at_work = Lock()

    def inspected(*args, **kwargs):
        assert at_work.acquire(blocking=False)
        time.sleep(0.05)
        at_work.release()
        return {"places": [], "predicted_tokens": 1, "nsar": {}, "histogram": []}

    def pretrained(recipe, out, changes):
        out.mkdir(parents=True)
        (out / "log.jsonl").write_text("{}\n")

    monkeypatch.setattr(grid, "inspect", inspected)
    monkeypatch.setattr(grid, "pretrain", pretrained)
    words = [EXAMPLES / "grid.yaml", tmp_path / "out", "--logs", tmp_path / "logs", "--only", "0.3m/*"]
    run(monkeypatch, grid, *words, "--train", "t", "--held-out", "h", "--author", "a", "--processes", "8")
    assert len(list(tmp_path.rglob("logs/**/*.jsonl"))) > 8


@pytest.mark.slow
def test_a_run_that_fails_says_why(monkeypatch, tmp_path):
    words = [EXAMPLES / "grid.yaml", tmp_path / "out", "--logs", tmp_path / "logs", "--only", "0.3m/dense/0.004-0"]
    words += ["--train", tmp_path / "no.txt", "--held-out", tmp_path / "no.txt", "--author", tmp_path / "no.txt"]
    with pytest.raises(RuntimeError, match="Unable to find"):
        run(monkeypatch, grid, *words)
    assert not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.slow  # a process for each run
def test_a_grid_trains_what_is_missing(monkeypatch, tmp_path):
    texts = "\n".join(islice(World.from_seed(0).texts(0), 1500))
    for name, text in (("train", texts), ("held_out", texts[-20000:]), ("author", texts[:20000])):
        (tmp_path / f"{name}.txt").write_text(text)
    small = yaml.safe_load((EXAMPLES / "recipes/books-300k.yaml").read_text())
    small["tokenizer"]["vocabulary"] = 300
    small["data"] |= {"context": 32, "validation_sequences": 16}
    small["training"] |= {"max_steps": 20, "logging_steps": 10, "eval_steps": 10, "warmup_steps": 2}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    asked = {
        "recipe": "small.yaml",
        "sizes": {"tiny": {"llama": {"sizes.intermediate_size": 68}, "finedeep": {"sizes.intermediate_size": 64}}},
        "models": {"dense": {"model": "llama"}, "M=2 K=8": {}},
        "runs": [{"size": "tiny", "models": ["dense", "M=2 K=8"], "learning_rates": [0.004]}],
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(asked))
    words = [tmp_path / "grid.yaml", tmp_path / "out", "--logs", tmp_path / "logs", "--processes", "2"]
    for name in ("train", "held_out", "author"):
        words += [f"--{name.replace('_', '-')}", tmp_path / f"{name}.txt"]
    run(monkeypatch, grid, *words)
    logs = {path: path.stat().st_mtime_ns for path in (tmp_path / "logs").rglob("*.jsonl")}
    groups = results.groups_of(map(results.read, logs))
    assert groups.keys() == {("tiny", "dense"), ("tiny", "m-2-k-8")}
    for group in groups.values():
        losses = group.first_run.losses
        assert losses["train"].keys() == losses["held_out"].keys() == {10 * 16 * 32, 20 * 16 * 32}
        assert losses["held_out"][20 * 16 * 32] < losses["held_out"][10 * 16 * 32] < math.log(300)
        assert 0 < group.first_run.nsar < 1
    run(monkeypatch, grid, *words)  # nothing is missing: nothing is made again
    assert {path: path.stat().st_mtime_ns for path in logs} == logs
