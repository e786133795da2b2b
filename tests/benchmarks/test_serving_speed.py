"""The serving benchmark's turns and ratios; its engines are vLLM's own (`make test-vllm`), and stood in for here."""

import importlib.util
import json
import sys

import pytest
from finedeep.benchmarks import __main__ as command
from finedeep.benchmarks import models, serving

# Each turn takes as many seconds as experts are stacked, with a line of its own in a common log.
STAND_IN = """
import json, pathlib, sys
folder, dtype, model_impl, mode, share = sys.argv[1:]
config = json.loads((pathlib.Path(folder) / "config.json").read_text())
for line in sys.stdin:
    with (pathlib.Path(folder).parent / "turns").open("a") as log:
        print(config["model_type"], config.get("num_expert_sublayers"), model_impl, file=log)
    print(config.get("num_expert_sublayers", 4), 8, flush=True)
"""


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(models.SHAPES, "tiny", models.Shape(32, 2, 128, 4, 2, 64))


def test_engines_take_turns_and_are_related_within_a_round(monkeypatch, tmp_path):
    monkeypatch.setattr(serving, "ENGINE", STAND_IN)
    taken = serving.measure(tmp_path, "tiny", "float32", "cpu", "compiled", 3)
    turns = (tmp_path / "turns").read_text().splitlines()
    assert turns == ["llama None auto", "llama None transformers", "finedeep 1 auto", "finedeep 2 auto"] * 4
    assert {name: seconds["wall"] for name, seconds in taken.items()} == {
        "dense": [4.0] * 3,
        "dense, backend": [4.0] * 3,
        "M=1": [1.0] * 3,
        "M=2": [2.0] * 3,
    }
    table = serving.table_of({"seconds": {"compiled": taken}})
    assert [cell.strip() for cell in table.splitlines()[-1].split("|")][1:-1] == [
        "compiled",
        "M=2",
        "8.00",
        "1.00",
        "0.50",
    ]


def test_an_engine_that_ends_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(serving, "ENGINE", "")
    with pytest.raises(SystemExit, match="engine of dense ended"):
        serving.measure(tmp_path, "tiny", "float32", "cpu", "eager", 1)


def test_modes_are_saved_and_put_into_the_document(monkeypatch, tmp_path):
    monkeypatch.setattr(serving, "ENGINE", STAND_IN)
    monkeypatch.setattr(serving, "installed", lambda: {"vllm": "0"})
    monkeypatch.setitem(serving.WORK, "cpu", ("tiny", "float32"))
    document = tmp_path / "D.md"
    document.write_text("<!-- serving-speed:begin -->\n<!-- serving-speed:end -->\n")
    words = ["--serving", "--device", "cpu", "--rounds", "1", "--output", tmp_path / "out", "--document", document]
    monkeypatch.setattr(sys, "argv", ["x", *map(str, words)])
    command.main()
    saved = json.loads((tmp_path / "out/results/serving-cpu.json").read_text())
    assert saved["seconds"].keys() == {"compiled", "eager"}
    assert saved["versions"]["vllm"] == "0"
    assert serving.table_of(saved) in document.read_text()
    document.write_text("<!-- serving-speed:begin -->\n<!-- serving-speed:end -->\n")
    monkeypatch.setattr(serving, "measure_all", None)  # nothing is measured to render again
    monkeypatch.setattr(sys, "argv", ["x", "--render", *map(str, words)])
    command.main()
    assert serving.table_of(saved) in document.read_text()


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="is about machines without vLLM")
def test_without_vllm_it_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["x", "--serving", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="needs vLLM"):
        command.main()
