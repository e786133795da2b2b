"""Run transformers' own model tests and hold Finedeep's results against Llama's: python tests/official/compare.py.

Exits with 1 where Finedeep fails a test that Llama does not fail, or skips or lacks one that Llama passes.
"""

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

from fetch import VERSION, FetchError, fetch

OUTCOMES = ["passed", "skipped", "failed"]
YARDSTICK = "TestLlama"


def run() -> dict[str, dict[str, str]]:
    """{class: {test: outcome}}."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        tests = Path(__file__).parent / "test_official.py"
        # transformers tests its own deprecated names; what is an error in this project's tests is a warning here
        pytest = [sys.executable, "-m", "pytest", "-W", "default::FutureWarning", "-W", "default::DeprecationWarning"]
        done = subprocess.run([*pytest, tests, "-q", "-r", "f", f"--junit-xml={report}"])
        if not report.exists():
            sys.exit(done.returncode or 1)
        return outcomes(report)


def outcomes(report: Path) -> dict[str, dict[str, str]]:
    """The same, from pytest's report. A test with subtests has several entries, and the outcome of the worst."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        tests = found.setdefault(case.get("classname").rpartition(".")[2], {})
        name = case.get("name").split(" ")[0]
        outcome = outcome_of(case)
        tests[name] = max(tests.get(name, outcome), outcome, key=OUTCOMES.index)
    return found


def outcome_of(case: ElementTree.Element) -> str:
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    return "passed" if case.find("skipped") is None else "skipped"


def shortfalls(found: dict[str, str], wanted: dict[str, str]) -> list[str]:
    """The tests in which a model does worse than the yardstick, and how."""
    worse = []
    for name in sorted(found.keys() | wanted.keys()):
        here, there = found.get(name, "absent"), wanted.get(name, "absent")
        if here != there and (here == "failed" or there == "passed"):
            worse.append(f"{name}: {here}, where Llama has it {there}")
    return worse


def main() -> int:
    try:
        fetch()
    except FetchError as error:
        sys.exit(f"error: {error}")
    results = run()
    if not results.get(YARDSTICK):
        sys.exit("error: no official test ran; the lines above say why")
    print(f"\n{'transformers ' + VERSION:32}" + "".join(f"{outcome:>9}" for outcome in OUTCOMES))
    worse = []
    for model, tests in results.items():
        count = Counter(tests.values())
        print(f"{model.removeprefix('Test'):32}" + "".join(f"{count[outcome]:>9}" for outcome in OUTCOMES))
        worse += [f"{model}.{line}" for line in shortfalls(tests, results[YARDSTICK])]
    print("\n".join(worse) or "Finedeep passes every test that Llama passes, and fails none.")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
