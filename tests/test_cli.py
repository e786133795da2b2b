import json
import subprocess
import sys
from pathlib import Path

import pytest
from finedeep_cli import SUBCOMMANDS, main
from finedeep_cli.convert_command import CUT

PROBE = """
import sys
from finedeep_cli import main
try:
    print("code", main(sys.argv[1:]))
except SystemExit as stop:
    print("code", stop.code)
print("heavy", sorted({"torch", "transformers", "lm_eval", "numpy"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["convert", "--help"], 0),
        (["eval", "--help"], 0),
        (["demo", "--help"], 0),
        (["convert", "a", "b", "--experts", "0"], 2),
        (["eval", "a", "--tasks", ","], 2),
        (["nonsense"], 2),
        ([], 0),
        (["--version"], 0),
        (["convert", "a", "b", "--sublayerz", "2"], 2),
        (["convert", "./no/such/folder", "b"], 2),
        (["convert", "org/model", "b", "--calibrate", "/no/such/text"], 2),
        (["heal", "org/model", "b", "--teacher", "./no/such/folder"], 2),
        (["inspect", "org/model", "--text", "/no/such/text"], 2),
        (["push", "./no/such/folder", "org/model"], 2),
        (["export", "./no/such/folder", "b"], 2),
        (["eval", "org/model"], 2),
        (["eval", "./no/such/folder", "--tasks", "arc_easy"], 2),
        (["eval", "org/model", "--tasks", "arc_easy", "--text", "text.txt"], 2),
        (["eval", "org/model", "--tasks", "arc_easy", "--baseline", "./no/such/folder"], 2),
        (["eval", "org/model", "--local", "/no/such/folder"], 2),
        (["eval", ".", "--tasks", "arc_easy", "--set", "revision=v2"], 2),
        (["eval", "org/model", "--tasks", "arc_easyy"], 2),
    ],
    ids=str,
)
def test_help_and_argument_errors_need_no_heavy_import(arguments, code):
    """What makes an answer slow is importing torch (seconds); without it the command takes well under one."""
    done = subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True)
    assert done.stdout.splitlines()[-2:] == [f"code {code}", "heavy []"], done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [(["covert", "a", "b"], "convert"), (["convert", "a", "b", "--sublayerz", "2"], "--sublayers")],
)
def test_what_was_probably_meant_is_named(capsys, arguments, meant):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert f"did you mean {meant}?" in capsys.readouterr().err


def test_the_package_is_the_command_too():
    done = subprocess.run([sys.executable, "-m", "finedeep", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("finedeep ")


def test_what_a_plain_cut_costs_is_said_before_and_after(capsys, tmp_path, dense):
    """With the way out; the default, which costs nothing, says none of it."""
    cost = "loses much of the model (SmolLM2-135M: 8.9 instead of 3.3 nats per token); --calibrate self brings"
    assert main(["convert", str(dense), str(tmp_path / "two"), "--sublayers", "2", "--experts", "4"]) == 0
    said = capsys.readouterr()
    assert cost in said.err
    assert cost in said.out
    assert main(["convert", str(dense), str(tmp_path / "one")]) == 0
    said = capsys.readouterr()
    assert "M=1 sub-layers of K=8 experts" in said.out
    assert "exact: the logits equal the dense model's" in said.out
    assert "loses much" not in said.out + said.err


def test_every_subcommand_explains_itself(capsys):
    for name in SUBCOMMANDS:
        with pytest.raises(SystemExit):
            main([name, "--help"])
        assert len(capsys.readouterr().out.splitlines()) > 8


def test_the_installed_command_runs():
    command = Path(sys.executable).parent / "finedeep"
    done = subprocess.run([command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "convert" in done.stdout


def test_convert_says_what_it_made(capsys, tmp_path, dense):
    assert main(["convert", str(dense), str(tmp_path / "out"), "--sublayers", "2", "--experts", "4"]) == 0
    printed = capsys.readouterr().out
    for part in ("M=2 sub-layers of K=4 experts, 6 neurons each", "4 of its neurons zero padding", "not exact"):
        assert part in printed


def test_json_is_all_that_stdout_has(capsys, tmp_path, dense):
    assert main(["convert", str(dense), str(tmp_path / "out"), "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert (found["num_expert_sublayers"], found["exact"], found["folder"]) == (1, True, str(tmp_path / "out"))
    assert "exact: the logits equal the dense model's" in said.err
    assert main(["refresh", str(tmp_path / "out"), "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["changes"] == {}


def test_json_has_no_number_that_json_cannot_say(capsys, monkeypatch):
    monkeypatch.setattr(
        "finedeep_cli.refresh_command.run", lambda arguments: {"a": [float("inf"), 1.5], "b": {"c": float("nan")}}
    )
    assert main(["refresh", "anywhere", "--json"]) == 0
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"a": [None, 1.5], "b": {"c": None}}


def test_what_a_cut_is_said_to_cost_was_measured():
    results = json.loads((Path(__file__).parents[1] / "examples/results/real.json").read_text())
    found = results["models"]["M=2 K=8, cut"]["losses"]["wikitext"]
    assert f"{found['loss']:.1f} instead of {found['dense_loss']:.1f} nats per token" in CUT
