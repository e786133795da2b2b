"""Make this checkout importable where it is not installed: `import from_checkout  # noqa`.

As a command it runs a module of it: `python examples/from_checkout.py finedeep.benchmarks --help`.
"""

import importlib.util
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# as in setup.cfg
PACKAGES = {
    "finedeep_files": ROOT / "files",
    "finedeep_cli": ROOT / "cli",
    "finedeep_serving": ROOT / "serving",
    "finedeep": ROOT,
}

for _name, _folder in PACKAGES.items():
    if importlib.util.find_spec(_name) is None:
        _spec = importlib.util.spec_from_file_location(
            _name, _folder / "__init__.py", submodule_search_locations=[str(_folder)]
        )
        sys.modules[_name] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules[_name])

if __name__ == "__main__":
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
