"""Makes the markers that transformers' own tests carry known to pytest, which is told to refuse unknown ones."""

import re
from pathlib import Path

from transformers import testing_utils

from .fetch import FOLDER

MARKED = ["test_modeling_common.py", "test_training_mixin.py"]


def pytest_configure(config):
    sources = [Path(testing_utils.__file__), *(FOLDER / "tests" / name for name in MARKED)]
    for source in filter(Path.is_file, sources):
        for name in sorted(set(re.findall(r"\bmark\.(\w+)", source.read_text(encoding="utf-8")))):
            config.addinivalue_line("markers", f"{name}: transformers' own")
