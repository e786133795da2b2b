"""Finedeep in a real vLLM, on a CPU: python tests/serving/run.py [pytest's arguments].

It has an environment of its own, under .matrix/vllm (3.4 GB), of exactly the packages of requirements.txt: what vLLM
requires would bring builds of torchvision and torchaudio that do not fit a torch for CPUs.
"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from environments import environment, run  # noqa: E402

REQUIREMENTS = HERE / "requirements.txt"
# A small cache for keys and values; threads that do not wait for each other.
SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}


def main() -> int:
    installs = [
        ["--no-deps", "--requirement", "tests/serving/requirements.txt"],
        ["--no-deps", "--editable", "."],
    ]
    python = environment("vllm", REQUIREMENTS.read_text().splitlines(), installs)
    command = [python, "-m", "pytest", HERE, "-c", HERE.parent / "pytest.ini", *sys.argv[1:]]
    return run(command, env={**SETTINGS, **os.environ}).returncode


if __name__ == "__main__":
    sys.exit(main())
