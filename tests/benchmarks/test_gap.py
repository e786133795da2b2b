"""The measurement of what calibration brings back: what it runs, and how its lines become tables."""

import json
import shlex
import sys

import finedeep_cli
import pytest
import torch
from finedeep.benchmarks import gap, gap_curve
from finedeep.benchmarks.documents import check_marks, document_with, table_in
from transformers import LlamaForCausalLM


def line(**changes):
    common = {
        "model": "m",
        "shape": "2x8",
        "source": "self",
        "stage": "healed",
        "dense": 1.0,
        "cut": 2.0,
        "seconds": 60.0,
        "threads": 2,
    }
    command = "finedeep heal BEFORE OUT --teacher DENSE --data DATA --steps 7 --seed 0"
    return {**common, "seed": 0, "loss": 1.1, "command": command, **changes}


def test_means_over_seeds_and_shares_of_the_gap():
    lines = [line(seed=seed, loss=loss) for seed, loss in enumerate((1.1, 1.2, 1.3))]
    (row,) = [row for row in gap.table_of(lines).splitlines() if "healed" in row]
    assert "| 1.2000 | +0.2000 | 80.0% (70.0% to 90.0%) |  | 60 | 2 | 3 |" in row
    assert "`--steps 7`" in row
    assert "1.200 (80%, 1.0 min on 2)" in gap.summary_of(lines)
    assert "| 60 | 2 | 3 |" in gap.table_of([*lines, *lines])  # measured twice, and still three seeds


def test_the_share_on_another_text_is_by_that_texts_own_gap():
    lines = [line(other_text={"loss": 3.5, "dense": 3.0, "cut": 5.0}), line(seed=1)]
    (row,) = [row for row in gap.table_of(lines).splitlines() if "healed" in row]
    assert "| 90.0% (90.0% to 90.0%) | 75.0% (75.0% to 75.0%) |" in row


def test_what_was_done_otherwise_is_a_row_of_its_own():
    lines = [line(), line(command=line()["command"].replace("--steps 7", "--steps 70")), line(threads=1)]
    assert sum("healed" in row for row in gap.table_of(lines).splitlines()) == 3


def test_the_summary_has_what_was_measured_best():
    """With the most seeds; of these the lowest loss."""
    other = {name: line()["command"].replace("--steps 7", f"--steps {name}") for name in (70, 700)}
    lines = [line(seed=seed, loss=loss) for seed, loss in enumerate((1.3, 1.3))]
    lines += [line(seed=seed, loss=loss, command=other[70]) for seed, loss in enumerate((1.2, 1.2))]
    lines.append(line(loss=1.1, command=other[700]))
    assert "1.200 (80%" in gap.summary_of(lines)


def test_the_loss_is_that_of_the_whole_text(tmp_path, dense):
    windows = torch.randint(256, (20, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = LlamaForCausalLM.from_pretrained(dense)(windows, labels=windows).loss.item()
    assert gap.losses_of(dense, [windows[:3], windows])[1] == pytest.approx(expected, rel=1e-5)


def test_stages_run(tmp_path, dense, monkeypatch):
    """With few steps; and the command that a line names is the one that was run."""
    (tmp_path / "text.txt").write_text("There was a text, and it was not long. " * 200)
    monkeypatch.setattr(gap, "RESULTS", tmp_path / "gap.jsonl")
    few = ["--convert", "--calibration-tokens 4096 --calibration-steps 2", "--heal", "--steps 2 --tokens 2048"]
    few += [
        "--stages",
        "layer by layer",
        "healed",
        "--window",
        "64",
        "--shapes",
        "2x4",
        "--sources",
        "text",
        "--seeds",
        "3",
    ]
    monkeypatch.setattr(sys, "argv", ["gap", str(dense), str(tmp_path / "text.txt"), "--name", "tiny", *few])
    ran = []

    def in_this_process(command):
        ran.append(command)
        assert finedeep_cli.main([*map(str, command), "--quiet"]) == 0

    monkeypatch.setattr(gap, "run", in_this_process)
    gap.main()
    lines = [json.loads(text) for text in (tmp_path / "gap.jsonl").read_text().splitlines()]
    assert [(x["source"], x["stage"]) for x in lines] == [("text", "layer by layer"), ("text", "healed")]
    for x, command in zip(lines, ran[1:], strict=True):
        assert [word for word in shlex.split(x["command"])[1:] if not word.isupper()] == [
            word for word in map(str, command) if not word.startswith("/") and word != "self"
        ]
        assert x["seed"] == 3
        assert "other_text" not in x  # the half that it has learnt from
    assert 2048 < lines[1]["tokens_learnt"] <= 2 * 2048  # two steps, of which the last may be short
    assert lines[1]["seconds"] > lines[0]["seconds"]


def test_a_stage_is_a_process_of_its_own(monkeypatch):
    """Whose start-up counts, and which has the threads that this one has."""
    ran = []
    monkeypatch.setattr(gap.subprocess, "run", lambda words, **how: ran.append((words, how)))
    monkeypatch.setattr(gap.torch, "get_num_threads", lambda: 4)
    gap.run(["heal", "a"])
    ((words, how),) = ran
    assert words == [sys.executable, "-m", "finedeep_cli", "heal", "a", "--quiet"]
    assert how["check"]
    assert how["env"]["OMP_NUM_THREADS"] == "4"


def test_the_curve_counts_what_a_command_learns_from(tmp_path):
    """What it gives, or the options' own defaults; and all runs on sampled text are drawn."""
    heal, convert = line()["command"], "finedeep convert DENSE OUT --calibrate DATA"
    assert gap_curve.tokens_of(line(tokens_learnt=12_345)) == 12_345
    assert gap_curve.tokens_of(line(command=heal.replace("--seed", "--context 64 --batch-size 2 --seed"))) == 7 * 128
    assert gap_curve.tokens_of(line(command=convert)) == 65_536
    assert gap_curve.tokens_of(line(command=f"{convert} --calibration-tokens 4096 --seed 0")) == 4096
    healed = line(loss=1.25, tokens_learnt=7000)
    lines = [healed, line(stage="layer by layer", command=convert), line(source="text", stage="unknown")]
    assert gap_curve.left_of(lines[0]) == 0.25
    gap_curve.draw(lines, tmp_path / "gap.svg")
    content = (tmp_path / "gap.svg").read_text(encoding="utf-8")
    assert all(words in content for words in ("92 % closed", "layer by layer", "tokens learnt from"))


def test_the_pages_have_their_places():
    for mark in ("gap", "gap-summary"):
        check_marks(mark, document_with(mark))


def test_the_pages_show_what_was_measured():
    """As the command makes them from the committed lines."""
    lines = [json.loads(text) for text in gap.RESULTS.read_text(encoding="utf-8").splitlines()]
    assert gap.table_of(lines) == table_in("gap")
    assert gap.summary_of(lines) == table_in("gap-summary")
