"""Tests with the programs that people put around a model: python tests/programs/run.py [pytest's arguments].

They have an environment of their own, under .matrix/programs, since they bring more than this project needs.
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from environments import environment, pins, run  # noqa: E402

REQUIREMENTS = HERE / "requirements.txt"
# It allows transformers up to 5.17 only; it runs with the pinned one. What it requires is in requirements.txt.
LLM_COMPRESSOR = "llmcompressor==0.14.0.1"


def main() -> int:
    required = [line for line in REQUIREMENTS.read_text().splitlines() if line and not line.startswith("#")]
    installs = [
        ["--editable", ".[dev]"],
        ["--requirement", "tests/programs/requirements.txt"],
        ["--no-deps", LLM_COMPRESSOR],
    ]
    python = environment("programs", [*pins(), *required], installs)
    command = [python, "-m", "pytest", HERE, "-c", HERE.parent / "pytest.ini", *sys.argv[1:]]
    return run(command).returncode


if __name__ == "__main__":
    sys.exit(main())
