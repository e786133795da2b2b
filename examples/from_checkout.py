"""Make this checkout importable as the package `finedeep` where it is not installed: `import from_checkout  # noqa`."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

if importlib.util.find_spec("finedeep") is None:
    _spec = importlib.util.spec_from_file_location(
        "finedeep", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    sys.modules["finedeep"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["finedeep"])
