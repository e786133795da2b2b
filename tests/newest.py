"""The newest of everything: python tests/newest.py [--keep] [--only pins|tests] [--update].

It asks pip whether the pinned versions can be installed by each Python that is on the PATH. Then it builds a fresh
environment under .matrix/newest with the newest release of every dependency that pip finds, torch alone as pinned, and
runs the fast tests and transformers' own model tests in it. --update writes what was found into docs/compatibility.md.
It exits with 1 where anything fails.
"""

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from environments import CONSTRAINTS, HOME, PIP, environment, fast_tests, official_tests, pins, put_table, run, table_in

OLDEST, LAST = 11, 20  # Python 3.x
# The packages whose versions are told: those that the model, the checkpoints and the scores depend on.
TOLD = ["transformers", "huggingface_hub", "safetensors", "tokenizers", "accelerate", "peft", "torchao", "bitsandbytes"]
TOLD += ["datasets", "lm_eval", "numpy", "scipy", "torch"]


def pythons() -> dict[str, str]:
    """{"3.11": its interpreter, ...}, of those on the PATH and the one that PYTHON names."""
    found = {}
    for name in (os.environ.get("PYTHON"), *(f"python3.{minor}" for minor in range(OLDEST, LAST)), sys.executable):
        path = shutil.which(name) if name else None
        if path is None:
            continue
        asked = [path, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        done = subprocess.run(asked, capture_output=True, text=True)
        if done.returncode == 0:  # a version manager may have a name on the PATH for what is not there
            found.setdefault(done.stdout.strip(), path)
    return {version: path for version, path in found.items() if int(version.partition(".")[2]) >= OLDEST}


def resolves(python: str) -> tuple[str, bool]:
    """Whether pip could install the pinned versions for an interpreter; it downloads what it must read, no more."""
    with tempfile.TemporaryDirectory() as nowhere:
        # With a target, what is installed already, and whether that is the system's, makes no difference.
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--dry-run", "--quiet", "--target", nowhere]
        done = run([*pip, "--constraint", CONSTRAINTS, ".[dev]"], capture_output=True)
    if done.returncode:
        print(done.stderr[-2000:], flush=True)
    return "resolve" if done.returncode == 0 else "do not resolve", done.returncode == 0


def versions(python: Path) -> dict[str, str]:
    """Of the packages that are told."""
    listed = json.loads(run([python, *PIP, "list", "--format=json"], capture_output=True, check=True).stdout)
    of = {package["name"].lower().replace("-", "_"): package["version"] for package in listed}
    return {name: of[name].partition("+")[0] for name in TOLD}


def _others(rows: list[str]) -> list[str]:
    """What the document has of the part that was not run."""
    found = [row.split("|")[1] for row in rows]
    return [row for row in table_in("newest").splitlines()[2:] if row.split("|")[1] not in found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="run in the environment that is there from the last time")
    parser.add_argument("--only", choices=("pins", "tests"), help="one of the two")
    parser.add_argument("--update", action="store_true", help="write the findings into docs/compatibility.md")
    arguments = parser.parse_args()
    fine, rows = [], []
    if arguments.only != "tests":
        for version, python in pythons().items():
            said, good = resolves(python)
            rows.append(f"| the pins, by pip on Python {version} | {said} |")
            fine.append(good)
            print(rows[-1], flush=True)
    if arguments.only != "pins":
        if not arguments.keep:
            shutil.rmtree(HOME / "newest", ignore_errors=True)
        python = environment("newest", [line for line in pins() if line.startswith("torch==")])
        found = versions(python)
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        for what, (said, good) in (
            ("its own model tests: Finedeep (Llama)", official_tests(python)),
            ("tests", fast_tests(python, processes=2)),
        ):
            rows.append(f"| {what} | {said} |")
            fine.append(good)
            print(rows[-1], flush=True)
        told = ", ".join(f"{name} {version}" for name, version in found.items())
        rows.append(f"| with | {told} |")
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    table = "\n".join([f"| run on {today} | |", "| --- | --- |", *rows])
    print(table)
    if arguments.update:
        put_table("newest", "\n".join([table, *_others(rows)]) if arguments.only else table)
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
