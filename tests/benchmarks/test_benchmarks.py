"""The benchmark gives all the same work, computes what it says, renders it. How fast anything is, is not a test."""

import json
import sys

import numpy
import pytest
import torch
from finedeep.benchmarks import __main__ as command
from finedeep.benchmarks import cases, growth, memory, models, results
from finedeep.benchmarks.cases import Case
from finedeep.benchmarks.documents import put_table
from finedeep_files import timing

TINY = models.Shape(32, 2, 128, 4, 2, 64)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(models.SHAPES, "tiny", TINY)
    monkeypatch.setattr(cases, "DECODED", 2)


@pytest.mark.parametrize(("M", "K"), [(1, 8), (2, 8), (4, 4)])
def test_the_contenders_do_the_same_work(M, K):
    assert models.largest_difference(TINY, M, K, "float32", "cpu") < 1e-5
    counts = models.parameters_of("tiny", M, K)
    norms_and_routers = 2 * ((M - 1) * 32 + M * K * 32)
    assert counts["finedeep"] == counts["dense"] + norms_and_routers
    loop = models.build("loop", TINY, M, K, "float32", "cpu")
    assert sum(p.numel() for p in loop.parameters()) == counts["finedeep"]


@pytest.mark.parametrize(
    "case",
    [
        Case("prefill", 2, 8, "tiny"),
        Case("prefill", 1, 40, "tiny", dtype="bfloat16"),
        Case("decode", 2, 1, "tiny"),
        Case("decode", 1, 1, "tiny", cache="static"),
        Case("train", 2, 8, "tiny"),
        Case("train", 2, 8, "tiny", checkpointing=True),
    ],
    ids=lambda case: "-".join(str(value) for value in case.fields().values()),
)
def test_every_kind_of_work_runs(case):
    taken = cases.run_case(case, 0, "cpu")
    assert set(taken) == set(models.CONTENDERS)
    assert all(len(times) == 5 and min(times) > 0 for times in taken.values())


def test_decoding_leaves_the_context_as_it_was():
    """Each run starts from the same full cache, whichever cache it is; otherwise later rounds would do more work."""
    model = models.build("finedeep", TINY, 2, 8, "float32", "cpu")
    for cache in cases.CACHES:
        work = cases.decode(Case("decode", 1, 1, "tiny", cache=cache), model, "cpu")
        for _ in range(2):
            given = work.prepare()
            assert int(given.get_seq_length()) == cases.CONTEXT
            work.do(given)
            assert int(given.get_seq_length()) == cases.CONTEXT + cases.DECODED


def test_blocks_agree_and_can_be_forced():
    block = growth.Block("tokens", tokens=40, M=2, K=4, hidden_size=64)
    h = torch.randn(1, 40, 64)
    built = {kind: growth.build_block(kind, block, "cpu") for kind in growth.BLOCKS}
    outputs = {kind: module(h) for kind, module in built.items()}
    for kind in ("loop", "definition", "one_product"):
        torch.testing.assert_close(outputs[kind], outputs["finedeep"], rtol=1e-4, atol=1e-5)
    calls = []
    for kind in ("definition", "one_product"):
        sublayer = built[kind].sublayers[0]
        original = getattr(sublayer, kind)
        setattr(sublayer, kind, lambda *args, kind=kind, original=original: calls.append(kind) or original(*args))
        built[kind](h)
    assert calls == ["definition", "one_product"]
    taken = growth.run_block(growth.Block("d", tokens=4, hidden_size=64, backward=True), growth.BLOCKS[:3], 0, "cpu")
    assert set(taken) == {"dense", "finedeep", "loop"}


def test_the_peak_of_memory_is_found(monkeypatch):
    """Also where it is gone again at the end."""

    def work(case, model, device):
        return timing.Work(lambda: None, lambda _: torch.ones(2**26).sum())

    monkeypatch.setitem(cases.WORKS, "train", work)
    assert 0.9 * 2**28 < memory.measure("finedeep", Case("train", 2, 16, "tiny"), "cpu") < 1.3 * 2**28


def test_runs_take_turns():
    order = []
    works = {name: timing.Work(lambda: None, lambda _, name=name: order.append(name), warmups=1) for name in "AB"}
    taken = timing.interleaved(works, 0, "cpu", fewest=3)
    assert order == ["A", "B"] + ["A", "B"] * 3
    assert {name: len(times) for name, times in taken.items()} == {"A": 3, "B": 3}


def test_quartiles_are_numpys():
    values = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6]
    assert timing.quartiles(values) == pytest.approx(numpy.percentile(values, [25, 50, 75]))
    assert timing.ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]


def measured(ratio, **case):
    fields = Case("prefill", 1, 2048).fields() | case
    return {
        "group": "model",
        "case": fields,
        "seconds": {"dense": [1.0, 2.0], "finedeep": [ratio, 2 * ratio], "loop": [1.5, 3.0]},
    }


def content_of(rows):
    machine = {"kind": "cpu", "device": "some CPU", "threads": 2}
    return {"machine": machine, "versions": {"torch": "2"}, "command": "c", "rows": rows}


def test_a_missed_target_is_set_in_bold():
    table = results.targets_table(content_of([measured(1.02), measured(1.0512, M=4, K=4)]))
    (row,) = [line for line in table.splitlines() if line.startswith("| prefill 1x2048")]
    assert row == "| prefill 1x2048 | finedeep / dense | ≤ 1.03 |  | 1.02 | **1.05** |  |"
    (row,) = [line for line in table.splitlines() if line.startswith("| the loop's prefill")]
    assert row == "| the loop's prefill 1x2048 | loop / finedeep | ≥ 1.20 |  | 1.47 | 1.43 |  |"


def test_a_run_is_saved_goes_on_and_is_rendered(tmp_path, monkeypatch):
    monkeypatch.setitem(cases.CASES, "cpu", [Case("prefill", 1, 4, "tiny"), Case("decode", 1, 1, "tiny")])
    monkeypatch.setattr(growth, "points", lambda device: [growth.Block(a, 4, hidden_size=64) for a in "KMd"])
    monkeypatch.setattr(command, "SHAPES", {"31M": TINY})
    monkeypatch.setitem(models.SHAPES, "31M", TINY)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- speed:begin -->\nold\n<!-- speed:end -->\nafter\n")
    arguments = [
        "x",
        "--device",
        "cpu",
        "--seconds",
        "0",
        "--output",
        str(tmp_path),
        "--document",
        str(readme),
        "--only",
    ]
    monkeypatch.setattr(sys, "argv", [*arguments, "prefill"])
    command.main()
    first = json.loads((tmp_path / "results" / "speed-cpu.json").read_text())
    assert [row["group"] for row in first["rows"]] == ["model"]
    monkeypatch.setattr(sys, "argv", [*arguments, "prefill,decode,growth", "--resume"])
    command.main()
    second = json.loads((tmp_path / "results" / "speed-cpu.json").read_text())
    assert second["rows"][0] == first["rows"][0]  # not measured again
    assert [row["group"] for row in second["rows"]] == ["model", "model", "growth", "growth", "growth"]
    page = (tmp_path / "RESULTS.md").read_text()
    assert "Not yet measured" in page
    assert "## CPU" in page
    assert "| decode, batch 1, dynamic cache | tiny |" in page
    assert (tmp_path / "results" / "ratio-cpu.svg").read_text().count("<svg") == 1
    assert "old" not in readme.read_text()
    assert readme.read_text().startswith("before\n")
    monkeypatch.setattr(sys, "argv", [*arguments, "decode"])
    command.main()  # anew
    third = json.loads((tmp_path / "results" / "speed-cpu.json").read_text())
    assert third["rows"][:1] == first["rows"]
    assert sorted(row["group"] for row in third["rows"]) == sorted(row["group"] for row in second["rows"])
    second["versions"]["torch"] = "1.0"
    (tmp_path / "results" / "speed-cpu.json").write_text(json.dumps(second))
    with pytest.raises(SystemExit, match=r"figures of both would be mixed.*--resume"):
        command.main()


def test_a_document_without_the_marks_is_left_alone(tmp_path):
    document = tmp_path / "D.md"
    document.write_text("text")
    with pytest.raises(ValueError, match="has no <!-- speed:begin -->"):
        put_table("speed", "table", document)
    assert document.read_text() == "text"


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_no_gpu_is_said(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--device", "cuda"])
    with pytest.raises(SystemExit):
        command.main()
    assert "torch finds no GPU here" in capsys.readouterr().err


def test_help_teaches(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--help"])
    with pytest.raises(SystemExit) as left:
        command.main()
    assert left.value.code == 0
    printed = capsys.readouterr().out
    assert "--only" in printed
    assert "examples:" in printed
