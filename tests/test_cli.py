import subprocess
import sys
from pathlib import Path

import pytest
from finedeep_cli import SUBCOMMANDS, main

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
        ([], 2),
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
