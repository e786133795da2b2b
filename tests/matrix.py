"""Every supported version of transformers: python tests/matrix.py [--only VERSION] [--update].

For each version it builds an environment under .matrix/ (once), runs the fast tests and transformers' own model tests,
and loads what every other version has written. It prints a Markdown table; --update writes it into
docs/compatibility.md. It takes about ten minutes a version, two versions at a time, and continues where one fails, to
report all; it exits with 1 then.
"""

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from environments import HOME, environment, fast_tests, official_tests, pins, put_table, run

VERSIONS = ["4.57.6", "5.0.0", "5.10.4", "5.23.0", "5.24.0"]
# Each version of transformers brings its own of these; everything else is as constraints.txt has it.
NOT_PINNED = ("transformers", "huggingface_hub", "tokenizers", "typer", "datasets", "fsspec")


def environment_of(version: str) -> Path:
    """The interpreter of an environment with this version."""
    kept = [line for line in pins() if not line.startswith(tuple(f"{name}==" for name in NOT_PINNED))]
    return environment(version, [*kept, f"transformers=={version}"])


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
    parser.add_argument("--update", action="store_true", help="write the table into docs/compatibility.md")
    arguments = parser.parse_args()
    versions = arguments.only or VERSIONS
    pythons = {version: environment_of(version) for version in versions}
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
        put_table("matrix", table)
    return 0 if everything else 1


if __name__ == "__main__":
    sys.exit(main())
