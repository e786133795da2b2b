"""Training from random weights, many models side by side: the shuffled text, the grid, the tables."""

import json
import math
import random
import statistics
import sys
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))
import mix  # noqa: E402
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
    lines.append({"nsar": {"0.1": nsar}})
    return f"{size}/{model}/{rate:g}-{seed}.jsonl", "\n".join(map(json.dumps, lines))


@pytest.fixture
def groups(tmp_path):
    made = [log("s", "dense", 0.01, seed, (5, 3.0 + seed / 10)) for seed in (0, 1, 2)]
    made += [log("s", "dense", 0.02, 0, (5, 3.5))]
    made += [log("s", "deep", 0.02, seed, (5, 2.9 + seed / 5), parameters=1010, nsar=0.75) for seed in (0, 1)]
    for name, text in made:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return results.groups_of(results.read(path) for path in sorted(tmp_path.glob("*/*/*.jsonl")))


def test_the_rate_that_counts_is_the_best_one(groups):
    dense = groups["s", "dense"]
    assert dense.tried == {0.01: 3.0, 0.02: 3.5}  # of seed 0, which both have
    assert [run.loss() for run in dense.runs.values()] == [3.0, 3.1, 3.2]


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


def test_rates_without_a_common_seed_cannot_be_compared(tmp_path):
    for name, text in (log("s", "dense", 0.01, 0, (5, 3)), log("s", "dense", 0.02, 1, (5, 3))):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit, match="no seed in common"):
        results.groups_of(results.read(path) for path in sorted(tmp_path.glob("*/*/*.jsonl")))
