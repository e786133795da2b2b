"""What the page says of larger models: files of a line a run, compared like with like."""

import json
import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
import larger  # noqa: E402


def line(model, held_out, author=4.0, rate=0.1, seed=0, steps=10, finished=True, size="31m"):
    """As examples/gpu_grid.py writes it; of a run that was cut the curve of its first half."""
    training = {"max_steps": steps, "per_device_train_batch_size": 100, "learning_rate": rate, "seed": seed}
    log = [
        {"step": step, "eval_held_out_loss": held_out + (steps - step) / 10, "eval_author_loss": author}
        for step in range(1, 1 + (steps if finished else steps // 2))
    ]
    recipe = {"data": {"context": 1000}, "training": training}
    found = {"name": f"{size}/{model}/{rate:g}-{seed}", "recipe": recipe, "finished": finished, "log": log}
    found["parameters"] = 31_000_000
    gates = {"gate_mean": 0.8, "gate_std": 0.5, "gate_low": 0.3} if model.startswith("m-") else {}
    return found | ({"nsar": {"0.1": 0.5}} | gates if finished else {})


def tables(tmp_path, *files):
    """Rows as {head: cell}, by mark."""
    (tmp_path / "gpu").mkdir()
    for i, lines in enumerate(files):
        (tmp_path / f"gpu/{i}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = {}
    for mark, table in larger.tables_of_larger(larger.read_larger(tmp_path)).items():
        head, _, *rows = ([cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines())
        found[mark] = [dict(zip(head, row, strict=True)) for row in rows]
    return found


def test_both_verdicts_are_of_each_models_best_rate(tmp_path):
    one = [line("dense", 3.5), line("dense", 3.6, rate=0.2), line("m-2-k-8-sandwich-norm", 3.6, rate=0.2)]
    other = [line("m-2-k-8-sandwich-norm", 3.4, author=3.9), line("m-1-k-16-sandwich-norm", 3.45)]
    other += [line("dense-sandwich-norm", 3.39, rate=0.2, author=4.1)]
    plain, norm = tables(tmp_path, one, other)["verdicts"]
    assert [plain["baseline"], norm["baseline"]] == ["dense", "dense, sandwich norm"]
    assert plain["size"] == "31m, 1M tokens"
    assert plain["its loss (other author)"] == "3.400 (3.900) at 0.1"
    assert plain["loss (other author)"] == "3.500 (4.000) at 0.1"
    assert plain["best Finedeep"] == "M=2 K=8, sandwich norm"
    assert plain["perplexity"] == f"{100 * math.expm1(-0.1):+.1f} %"
    assert norm["perplexity"] == f"{100 * math.expm1(0.01):+.1f} %"
    assert norm["perplexity, other author"] == f"{100 * math.expm1(-0.2):+.1f} %"


def test_perplexities_are_over_the_seeds_of_both(tmp_path):
    lines = [line("dense", 3.0), line("dense", 3.1, seed=1), line("m-2-k-8", 3.05, seed=1), line("m-2-k-8", 9, seed=2)]
    lines[-1]["log"][-1]["eval_held_out_loss"] = 3.0
    plain, norm = tables(tmp_path, lines)["verdicts"]
    assert plain["perplexity"] == f"{100 * math.expm1(-0.05):+.1f} %"
    assert plain["seeds"] == "1"
    assert norm["perplexity"] == ""


def test_runs_of_other_lengths_are_not_compared(tmp_path):
    lines = [line("dense", 3.0), line("m-2-k-8", 3.1, steps=20)]
    verdicts = tables(tmp_path, lines)["verdicts"]
    assert [row["size"] for row in verdicts] == ["31m, 1M tokens"] * 2 + ["31m, 2M tokens"] * 2
    assert all(row["perplexity"] == "" for row in verdicts)


def test_a_run_that_was_cut_has_its_curve_only(tmp_path):
    found = tables(tmp_path, [line("dense", 3.0), line("m-2-k-8", 2.0, finished=False)])
    assert [row["model"] for row in found["larger"]] == ["dense"]
    cut = found["larger-curves"][1]
    assert [cut[part] for part in ("20%", "40%", "60%", "100%")] == ["2.800", "2.600", "", ""]
    assert found["larger-curves"][0]["100%"] == "3.000"


def test_a_curve_is_of_measurements_near_its_shares(tmp_path):
    """Of 457 steps each 45th was measured, and the last."""
    run = line("dense", 3.0, steps=457)
    run["log"] = [point for point in run["log"] if point["step"] % 45 == 0 or point["step"] == 457]
    (row,) = tables(tmp_path, [run])["larger-curves"]
    assert row["20%"] == f"{3 + (457 - 90) / 10:.3f}"
    assert row["100%"] == "3.000"


def test_a_lucky_single_run_is_no_verdict(tmp_path):
    """Neither against models with more seeds, nor one rate's lucky seed against another rate's mean."""
    model = "m-1-k-16-sandwich-norm"
    lines = [line(name, loss, seed=s) for name, loss in (("dense", 3.0), (model, 3.1)) for s in (0, 1, 2)]
    lines += [line("m-1-k-64-sandwich-norm", 2.0)]
    lines += [line("m-1-k-16-expert-norms", 1.0, seed=s) for s in (0, 1, 2)]  # which is an idea, and in no package
    lines += [line("dense", 9.0, seed=3), line("dense", 3.05, rate=0.2)]  # at 0.1 seed 0 is better, the mean is worse
    row = tables(tmp_path, lines)["verdicts"][0]
    assert (row["best Finedeep"], row["seeds"]) == ("M=1 K=16, sandwich norm", "3")
    assert row["loss (other author)"].endswith("at 0.1")


def test_a_gate_that_is_always_one_is_not_shown(tmp_path):
    gates = {"gate_mean": 1.0, "gate_std": 0.0, "gate_low": 0.0}
    lines = [line("dense-sandwich-norm", 3.0) | gates, line("m-2-k-8", 3)]
    column = "gates: mean, spread, below 0.5"
    assert [row[column] for row in tables(tmp_path, lines)["larger"]] == ["", "0.80, 0.50, 30%"]


def test_of_a_run_in_two_files_the_whole_one_counts(tmp_path):
    found = tables(tmp_path, [line("dense", 3.0)], [line("dense", 2.0, finished=False)])
    assert [row["held out"] for row in found["larger"]] == ["3.000"]


def test_the_same_run_twice_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"1\.jsonl has 31m, 1M tokens dense 0\.1-0, as another file has"):
        tables(tmp_path, [line("dense", 3.0)], [line("dense", 3.0)])


@pytest.mark.parametrize("name", ["dense", "M=2 K=8", "M=1 K=16, sandwich norm", "M=2 K=8, sandwich norm, c=1"])
def test_a_name_is_shown_as_the_grid_has_it(name):
    assert larger.shown(larger.slug(name)) == name
