"""Every supported version of transformers: python tests/matrix.py [--only VERSION] [--update].

For each version it builds an environment under .matrix/ (once), runs the fast tests and transformers' own model tests,
and loads what every other version has written. It prints a Markdown table; --update writes it into the README. It takes
about ten minutes a version, two versions at a time, and goes on where one fails, to report all; it exits with 1 then.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOME = ROOT / ".matrix"
VERSIONS = ["4.57.6", "5.0.0", "5.10.4", "5.23.0", "5.24.0"]
# Each version of transformers brings its own of these; everything else is as constraints.txt has it.
NOT_PINNED = ("transformers", "huggingface_hub", "tokenizers", "typer", "datasets", "fsspec")

sys.path.insert(0, str(ROOT / "benchmarks"))
from readme import put_into_readme  # noqa: E402


def run(command: list[str | Path], **options: object) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], text=True, cwd=ROOT, **options)


def environment(version: str) -> Path:
    """The interpreter of an environment with this version, built where it is not there yet or of other packages."""
    folder = HOME / version
    python, done = folder / "bin" / "python", folder / ".installed"
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    kept = [line for line in lines if not line.startswith(tuple(f"{name}==" for name in NOT_PINNED))]
    wanted = "\n".join([*kept, f"transformers=={version}", ""])
    if not done.exists() or done.read_text() != wanted:
        print(f"Building an environment with transformers {version} ...", flush=True)
        run([sys.executable, "-m", "venv", folder], check=True)
        constraints = folder / "constraints.txt"
        constraints.write_text(wanted)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--constraint", constraints]
        run([*pip, "--editable", ".[dev]"], check=True)
        done.write_text(wanted)
    return python


def fast_tests(python: Path) -> tuple[str, bool]:
    """pytest's last line in short, and whether all passed."""
    done = run([python, "-m", "pytest", "tests", "-m", "not slow", "-q"], capture_output=True)
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


def loads(python: Path, folder: Path) -> tuple[str, bool]:
    """The largest difference between logits of all the versions' folders, and whether all are equal."""
    done = run([python, "tests/cross_version.py", "read", folder], capture_output=True)
    if done.returncode:
        print(done.stderr[-4000:], flush=True)
        return "failed", False
    found = json.loads(done.stdout.strip().splitlines()[-1])
    worst = max(found.values())
    return f"{worst:g} ({len(found)} versions)", worst < 1e-6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=VERSIONS, help="this version, instead of all")
    parser.add_argument("--jobs", type=int, default=2, help="versions at a time (default: 2)")
    parser.add_argument("--update", action="store_true", help="write the table into README.md")
    arguments = parser.parse_args()
    versions = arguments.only or VERSIONS
    pythons = {version: environment(version) for version in versions}
    folders = HOME / "folders"
    for python in pythons.values():
        run([python, "tests/cross_version.py", "write", folders], check=True, capture_output=True)
    table = "| transformers | tests | its own model tests: Finedeep (Llama) | difference of logits across versions |\n"
    table += "| --- | --- | --- | --- |"

    def check(version: str) -> tuple[str, bool]:
        start = time.monotonic()
        python = pythons[version]
        results = [loads(python, folders), official_tests(python), fast_tests(python)]
        across, official, fast = (text for text, _ in results)
        print(f"{version}: {fast}; {official}; {across}; {time.monotonic() - start:.0f} s", flush=True)
        return f"\n| {version} | {fast} | {official} | {across} |", all(fine for _, fine in results)

    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // arguments.jobs))
    with ThreadPoolExecutor(arguments.jobs) as workers:
        rows = list(workers.map(check, versions))
    table += "".join(row for row, _ in rows)
    everything = all(fine for _, fine in rows)
    print(table)
    if arguments.update:
        put_into_readme("matrix", table)
    return 0 if everything else 1


if __name__ == "__main__":
    sys.exit(main())
