"""Every snippet of the README runs."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_dense
from finedeep.demo.questions import write_tasks
from finedeep.demo.world import World
from finedeep_cli import main
from hub_server import running_hub
from isolated import run_isolated

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def snippets(section, language):
    part = README.split(f"\n## {section}\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(rf"```{language}\n(.*?)```", part, re.DOTALL)


def snippet(section, language):
    return snippets(section, language)[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which `./llama` is a dense model, as the snippets assume."""
    folder = tmp_path_factory.mktemp("readme")
    make_dense(folder / "llama")
    return folder


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


def test_convert_snippet(here):
    command = shlex.split(snippet("Convert", "bash"))
    assert command[0] == "finedeep"
    assert main(command[1:]) == 0
    assert (here / "llama-finedeep/config.json").is_file()


def test_more_convert_snippets(here, capsys):
    lines = "".join(snippets("Convert", "bash")[1:]).splitlines()
    assert len(lines) == 5
    for line in lines:
        command = shlex.split(line, comments=True)
        assert command[0] == "finedeep"
        assert main(command[1:]) == 0
        if "--dry-run" not in command:
            assert (here / command[3] / "config.json").is_file()
    assert "model.embed_tokens.weight" in capsys.readouterr().out


def test_calibration_snippet(here):
    convert, heal = snippet("Keep what the dense model knows", "bash").splitlines()
    assert main([*shlex.split(convert)[1:], "--calibration-tokens", "4096", "--calibration-steps", "5"]) == 0
    assert main([*shlex.split(heal)[1:], "--tokens", "4096", "--steps", "3"]) == 0
    assert (here / "llama-healed/config.json").is_file()


def test_load_snippet(here):
    code = snippet("Load", "python")
    text = run_isolated(f"import os; os.chdir({str(here)!r})\n{code}\nanswer = type(model).__name__")
    assert text == "FinedeepForCausalLM"


def test_evaluate_snippet(here, capsys, monkeypatch):
    # the tasks named need downloads: the same command with local ones in their place
    names = write_tasks(here / "tasks", World.from_seed(0), seed=0, samples=4)
    (here / "text.txt").write_text("One thing after another. " * 100)
    line = snippet("Evaluate", "bash").replace("finedeep_suite", ",".join(names[:2]))
    assert line != snippet("Evaluate", "bash")
    monkeypatch.setattr("finedeep.eval.report.cost.SECONDS", 0.1)
    assert main([*shlex.split(line)[1:], "--include-path", str(here / "tasks")]) == 0
    assert re.search(r"\| +dense \| +finedeep \|", capsys.readouterr().out)
    assert (here / "results/report.html").is_file()


def test_inspect_snippet(here, capsys):
    (here / "text.txt").write_text("One thing after another. " * 100)
    assert main(shlex.split(snippets("Evaluate", "bash")[1])[1:]) == 0
    assert "NSAR at 0.1" in capsys.readouterr().out


def test_pretrain_snippet(here):
    text = "\n".join(f"{i} and {i + 1} are {2 * i + 1}." for i in range(3000))
    (here / "a.txt").write_text(text)
    (here / "b.txt").write_text(text[-9000:])
    words = snippet("Train and adapt", "bash").split()
    assert words[0] == "python"
    script, recipe = (str(ROOT / word) for word in words[1:3])
    small = ["training.max_steps=2", "training.save_steps=2", "sizes.num_hidden_layers=1", "tokenizer.vocabulary=300"]
    changes = [word for change in small for word in ("--set", change)]
    subprocess.run([sys.executable, script, recipe, *words[3:], *changes], check=True, cwd=here, capture_output=True)
    assert (here / "out/model/model.safetensors").is_file()


def test_adapt_snippet(here):
    pytest.importorskip("peft")
    code = snippet("Train and adapt", "python")
    names = run_isolated(
        f"""
import os; os.chdir({str(here)!r})
{code}
from peft import AutoPeftModelForCausalLM
model.save_pretrained("./adapter")
model = AutoPeftModelForCausalLM.from_pretrained("./adapter", trust_remote_code=True)
answer = [name for name, _ in model.named_parameters() if "lora_" in name]
"""
    )
    assert any("down_proj" in name for name in names)


def test_push_snippet_and_load_from_the_hub(here):
    with running_hub() as (hub, environment):
        command = [sys.executable, "-m", "finedeep_cli", *shlex.split(snippet("Push", "bash"))[1:]]
        subprocess.run(command, check=True, cwd=here, env={**os.environ, **environment}, timeout=300)
        uploaded = hub.repositories["you/llama-finedeep"][-1]
        assert {"config.json", "modeling_finedeep.py", "model.safetensors", "README.md"} <= set(uploaded)
        code = snippet("Load", "python").replace("./llama-finedeep", "you/llama-finedeep")
        cache = str(here / "clean-cache")
        loaded = run_isolated(f"{code}\nanswer = type(model).__name__", HF_HOME=cache, **environment)
    assert loaded == "FinedeepForCausalLM"


def test_the_first_screen_shows_both_commands():
    screen = "\n".join(README.splitlines()[:30])
    assert "make demo" in screen
    assert "make test" in screen


def plain_cut_table():
    return README.split("<!-- plain-cut:begin -->\n")[1].split("\n<!-- plain-cut:end -->")[0]


def test_the_table_of_the_plain_cut_is_whole():
    assert plain_cut_table().count("\n") == 5


def test_the_table_of_the_plain_cut_is_what_the_command_prints(data, stories260k, monkeypatch, capsys):
    script = ROOT / "examples/plain_cut.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(stories260k), str(data / "text/tinystories.txt")])
    monkeypatch.syspath_prepend(script.parent)
    monkeypatch.setattr("transformers.utils.logging.disable_progress_bar", lambda: None)  # for good
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out.strip()
    numbers = [[float(x) for x in re.findall(r"-?\d+\.\d+", text)] for text in (plain_cut_table(), printed)]
    assert numbers[0] == pytest.approx(numbers[1], abs=2e-4)


@pytest.mark.slow
def test_the_table_of_quantisation_is_what_the_command_prints(data, stories260k):
    pytest.importorskip("torchao")
    pytest.importorskip("bitsandbytes")
    table = README.split("<!-- quantisation:begin -->\n")[1].split("\n<!-- quantisation:end -->")[0]
    command = [sys.executable, ROOT / "examples/quantisation.py", stories260k, data / "text/tinystories.txt"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    numbers = [[float(x) for x in re.findall(r"[-+]?\d+\.\d+", text)] for text in (table, printed)]
    assert numbers[0] == pytest.approx(numbers[1], abs=5e-3)  # rounding activations differs a little between CPUs


def test_the_table_of_conversion_is_that_of_the_committed_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from conversion import RESULTS, table_of

    table = README.split("<!-- conversion:begin -->\n")[1].split("\n<!-- conversion:end -->")[0]
    assert table == table_of(json.loads(RESULTS.read_text()))


def test_all_files_named_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README) + re.findall(
        r"`((?:examples|tests|benchmarks)/[\w./]+)`", README
    ):
        assert (ROOT / target).exists(), target


def test_versions_named_are_the_ones_pinned():
    pins = (ROOT / "constraints.txt").read_text()
    assert "torch==2.13.0" in pins
    for name, version in re.findall(r"(transformers|torch) (\d+\.\d+\.\d+)", README):
        assert f"{name}=={version}" in pins, json.dumps([name, version])
