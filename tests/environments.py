"""Environments under .matrix/, each of other versions, and what is run in them."""

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOME = ROOT / ".matrix"
CONSTRAINTS = ROOT / "constraints.txt"
PIP = ["-m", "pip", "--disable-pip-version-check"]

sys.path.insert(0, str(ROOT / "benchmarks"))
from documents import put_table, table_in  # noqa: E402, F401


def run(command: list[str | Path], **options: object) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], text=True, cwd=ROOT, **options)


def pins() -> list[str]:
    """The lines of constraints.txt that pin a version."""
    return [line for line in CONSTRAINTS.read_text().splitlines() if "==" in line]


def environment(
    name: str, constraints: Iterable[str], installs: Iterable[list[str]] = (["--editable", ".[dev]"],)
) -> Path:
    """The interpreter of an environment, built where it is not there yet or of other packages.

    Args:
        name: of its folder under .matrix/.
        constraints: pip's, one a line.
        installs: arguments of one `pip install` after the other.
    """
    folder = HOME / name
    python, done = folder / "bin" / "python", folder / ".installed"
    wanted = "\n".join([*constraints, *(f"# pip install {' '.join(arguments)}" for arguments in installs), ""])
    if not done.exists() or done.read_text() != wanted:
        print(f"Building the environment {name} ...", flush=True)
        run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        file = folder / "constraints.txt"
        file.write_text(wanted)
        for arguments in installs:
            run([python, *PIP, "install", "--quiet", "--constraint", file, *arguments], check=True)
        done.write_text(wanted)
    return python


def fast_tests(python: Path, processes: int = 1) -> tuple[str, bool]:
    """pytest's last line in short, and whether all passed."""
    parallel = ["--numprocesses", str(processes), "--dist", "loadfile"] if processes > 1 else []
    done = run([python, "-m", "pytest", "tests", "-m", "not slow", "-q", *parallel], capture_output=True)
    counts = re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout.strip().splitlines()[-1])
    if done.returncode:
        print(done.stdout[-6000:], done.stderr[-2000:], sep="\n", flush=True)
    return ", ".join(f"{count} {outcome}" for count, outcome in counts), done.returncode == 0


def official_tests(python: Path) -> tuple[str, bool]:
    """How many of transformers' own tests Llama and Finedeep pass, and whether Finedeep passes all that Llama does."""
    done = run([python, "tests/official/compare.py"], capture_output=True)
    passed = dict(re.findall(r"^(Llama|Finedeep) +(\d+)", done.stdout, re.MULTILINE))
    if done.returncode:
        print(done.stdout[-6000:], done.stderr[-2000:], sep="\n", flush=True)
    return f"{passed.get('Finedeep', '-')} ({passed.get('Llama', '-')})", done.returncode == 0
