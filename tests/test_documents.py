"""Every snippet of the documents runs, every table is what its command makes, every link leads somewhere."""

import ast
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
from finedeep.benchmarks.documents import table_in
from finedeep.demo.questions import write_tasks
from finedeep.demo.world import World
from finedeep_cli import main
from forked import run_script
from hub_server import running_hub
from isolated import run_isolated

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
TEXT = "One thing after another. " * 100
# Blocks that are shown elsewhere too, or that other tests run: of the page, how many there are, and where they run.
ELSEWHERE = {
    ("README.md", "bash"): "make demo and make test by CI, pip by every environment, the commands below",
    ("evaluate.md", "bash"): "the plain harness: tests/eval/test_eval.py",
    ("quantise.md", "python"): "tests/programs/test_llm_compressor.py",
    ("performance.md", "bash"): "tests/benchmarks",
    ("push.md", "bash"): "refresh: tests/convert/test_refresh.py",
    ("real.md", "bash"): "tests/examples/test_real.py",
    ("serving.md", "bash"): "make test-vllm",
    ("serving.md", "python"): "make test-vllm",
}


def snippets(page, language):
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


def commands(page):
    """Of its bash blocks, without comments: a list of words for each line."""
    lines = "".join(snippets(page, "bash")).splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which `./llama` is a dense model, as the snippets assume."""
    folder = tmp_path_factory.mktemp("documents")
    make_dense(folder / "llama")
    (folder / "text.txt").write_text(TEXT)
    assert main(["convert", str(folder / "llama"), str(folder / "llama-finedeep"), "--quiet"]) == 0
    return folder


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


def run(words, *more):
    assert words[0] == "finedeep"
    assert main([*words[1:], *more]) == 0


def test_every_block_is_run_by_a_test():
    """Each page with a block has a test here, or says above where its blocks run."""
    source = Path(__file__).read_text(encoding="utf-8")
    for page, text in PAGES.items():
        for language in set(re.findall(r"```(bash|python)\n", text)):
            assert f'"{page}"' in source, (page, language)


def test_convert(here, capsys):
    dry, *rest = commands("convert.md")[1:]
    for words in (dry, *rest):
        run(words)
        if "--dry-run" not in words:
            assert (here / words[3] / "config.json").is_file()
    assert "model.embed_tokens.weight" in capsys.readouterr().out
    assert commands("convert.md")[0] == ["finedeep", "convert", "./llama", "./llama-finedeep"]  # as `place` has done


def test_readme_converts_as_the_pages_do():
    found = [words for words in commands("README.md") if words[0] == "finedeep"]
    assert found[0] == commands("convert.md")[0]
    assert found[1] == commands("heal.md")[0]
    assert found[2] == commands("evaluate.md")[0]
    assert found[3] == [*commands("push.md")[0], "--results", "./results"]
    assert snippets("README.md", "python")[0] == snippets("load.md", "python")[0]


def test_calibrate_and_heal(here):
    convert, heal, by_adapter = commands("heal.md")
    run(convert, "--calibration-tokens", "4096", "--calibration-steps", "5")
    run(heal, "--tokens", "4096", "--steps", "3")
    run(by_adapter, "--tokens", "4096", "--steps", "2")
    for folder in ("llama-healed", "by-adapter"):
        assert (here / folder / "config.json").is_file()


def test_load(here):
    code = snippets("load.md", "python")[0]
    text = run_isolated(f"import os; os.chdir({str(here)!r})\n{code}\nanswer = type(model).__name__")
    assert text == "FinedeepForCausalLM"


def test_from_random_weights():
    found = {}
    exec(snippets("load.md", "python")[1], found)
    assert found["model"].num_parameters() < 10**6


def test_evaluate(here, capsys, monkeypatch):
    # the tasks named need downloads: the same command with local ones in their place
    names = write_tasks(here / "tasks", World.from_seed(0), seed=0, samples=4)
    words = [word.replace("finedeep_suite", ",".join(names[:2])) for word in commands("evaluate.md")[0]]
    assert words != commands("evaluate.md")[0]
    monkeypatch.setattr("finedeep.eval.report.cost.SECONDS", 0.1)
    monkeypatch.setattr("finedeep.eval.report.cost.peak_memory", lambda *_: 10**9)  # measured in tests/eval
    run(words, "--include-path", str(here / "tasks"))
    assert re.search(r"\| +dense \| +finedeep \|", capsys.readouterr().out)
    assert (here / "results/report.html").is_file()


def test_inspect(here, capsys):
    run(commands("inspect.md")[0])
    assert "NSAR at 0.1" in capsys.readouterr().out


def test_train(here):
    text = "\n".join(f"{i} and {i + 1} are {2 * i + 1}." for i in range(3000))
    (here / "a.txt").write_text(text)
    (here / "b.txt").write_text(text[-9000:])
    words = commands("train.md")[0]
    assert words[0] == "python"
    script, recipe = (str(ROOT / word) for word in words[1:3])
    small = ["training.max_steps=2", "training.save_steps=2", "sizes.num_hidden_layers=1", "tokenizer.vocabulary=300"]
    changes = [word for change in small for word in ("--set", change)]
    run_script(script, recipe, *words[3:], *changes, cwd=here)
    assert (here / "out/model/model.safetensors").is_file()


def test_adapt(here):
    pytest.importorskip("peft")
    code = snippets("adapt.md", "python")[0]
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


@pytest.mark.slow  # four processes that load the model; tests/convert/test_publish.py pushes as well
def test_push_and_load_from_the_hub(here):
    with running_hub() as (hub, environment):
        command = [sys.executable, "-m", "finedeep_cli", *commands("push.md")[0][1:]]
        subprocess.run(command, check=True, cwd=here, env={**os.environ, **environment}, timeout=300)
        uploaded = hub.repositories["you/llama-finedeep"][-1]
        assert {"config.json", "modeling_finedeep.py", "model.safetensors", "README.md"} <= set(uploaded)
        code = snippets("load.md", "python")[0].replace("./llama-finedeep", "you/llama-finedeep")
        cache = str(here / "clean-cache")
        loaded = run_isolated(f"{code}\nanswer = type(model).__name__", HF_HOME=cache, **environment)
    assert loaded == "FinedeepForCausalLM"


def test_the_first_screen_shows_both_commands():
    screen = "\n".join(PAGES["README.md"].splitlines()[:40])
    assert "make demo" in screen
    assert "make test" in screen
    assert len(PAGES["README.md"].splitlines()) <= 150


def test_the_summary_is_that_of_the_committed_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    from summary import table

    assert table_in("summary") == table()


def test_the_layer_is_what_its_script_draws(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs/figures")
    from layer import OUT, figure

    assert OUT.read_text(encoding="utf-8") == figure()


def test_the_table_of_the_plain_cut_is_what_the_command_prints(data, stories260k, monkeypatch, capsys):
    script = ROOT / "examples/plain_cut.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(stories260k), str(data / "text/tinystories.txt")])
    monkeypatch.syspath_prepend(script.parent)
    monkeypatch.setattr("transformers.utils.logging.disable_progress_bar", lambda: None)  # for good
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out.strip()
    table = table_in("plain-cut")
    assert table.count("\n") == 5
    numbers = [[float(x) for x in re.findall(r"-?\d+\.\d+", text)] for text in (table, printed)]
    assert numbers[0] == pytest.approx(numbers[1], abs=2e-4)


@pytest.mark.slow
def test_the_table_of_quantisation_is_what_the_command_prints(data, stories260k):
    pytest.importorskip("torchao")
    pytest.importorskip("bitsandbytes")
    command = [sys.executable, ROOT / "examples/quantisation.py", stories260k, data / "text/tinystories.txt"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    numbers = [[float(x) for x in re.findall(r"[-+]?\d+\.\d+", text)] for text in (table_in("quantisation"), printed)]
    assert numbers[0] == pytest.approx(numbers[1], abs=5e-3)  # rounding activations differs a little between CPUs


def test_the_tables_of_the_real_model_are_those_of_the_committed_results(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples/real")
    import estimates
    from tables import write_page

    page = tmp_path / "real.md"
    page.write_text(PAGES["real.md"], encoding="utf-8")
    write_page(json.loads((ROOT / "examples/results/real.json").read_text(encoding="utf-8")), page)
    assert page.read_text(encoding="utf-8") == PAGES["real.md"]
    assert table_in("larger-estimates") == estimates.table()


OTHERS = ("contains custom code", "LlamaModel.forward", "module 'transformers_modules", "torchao", "KernelPreference")
OTHERS += ("register_constant", "torch.compile", "HTTP 401")


def test_messages_that_troubleshooting_names_are_printed_by_the_code():
    literals = []
    for path in ROOT.glob("*/**/*.py"):
        if path.relative_to(ROOT).parts[0] not in ("tests", "examples", "docs") and ".venv" not in path.parts:
            literals += [
                node.value
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(node, ast.Constant) and isinstance(node.value, str)
            ]
    said = "\n".join(literals) + "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("*.py"))
    for heading in re.findall(r"^\*\*(`.+?`)\*\*", PAGES["troubleshooting.md"], re.MULTILINE):
        for message in re.findall("`(.+?)`", heading):
            if not any(other in message for other in OTHERS):
                for part in filter(None, (part.strip() for part in message.split("..."))):
                    assert part in said, (message, part)


def test_the_table_of_conversion_is_that_of_the_committed_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from conversion import RESULTS, table_of

    assert table_in("conversion") == table_of(json.loads(RESULTS.read_text()))


def test_the_table_of_serving_is_that_of_the_committed_results():
    from finedeep.benchmarks.serving import table_of

    content = json.loads((ROOT / "benchmarks/results/serving-cpu.json").read_text())
    assert table_in("serving-speed") == table_of(content)


def anchors(page):
    """Of its headings, as GitHub and Sphinx make them."""
    headings = re.findall(r"^#+ (.+)$", PAGES[page], re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_every_file_named_is_there(page):
    folder = ROOT if page == "README.md" else ROOT / "docs"
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", PAGES[page]):
        file, _, anchor = target.partition("#")
        assert not file or (folder / file).exists(), target
        if anchor:
            assert anchor in anchors(Path(file).name if file else page), target
    for path in re.findall(r"`((?:examples|tests|benchmarks|docs)/[\w./]+)`", PAGES[page]):
        assert (ROOT / path).exists(), path


def test_versions_named_are_the_ones_pinned():
    pins = (ROOT / "constraints.txt").read_text()
    assert "torch==2.13.0" in pins
    for page, text in PAGES.items():
        for name, version in re.findall(r"(?:pinned|Tested with) (transformers|torch) (\d+\.\d+\.\d+)", text):
            assert f"{name}=={version}" in pins, (page, name, version)
