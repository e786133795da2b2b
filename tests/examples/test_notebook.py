"""The notebook runs from its first cell to its last, as a script."""

import json
from pathlib import Path

from forked import run_script

NOTEBOOK = Path(__file__).parents[2] / "examples" / "finedeep_in_five_minutes.ipynb"


def test_every_cell_runs(tmp_path):
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) == 6
    assert not any(cell.get("outputs") for cell in cells)  # what a run leaves is not kept
    script = tmp_path / "notebook.py"
    script.write_text("\n\n".join(code), encoding="utf-8")
    small = {"STEPS": "3", "TOKENS": "1024", "TMPDIR": str(tmp_path)}
    (printed,) = run_script(script, environment=small)
    lines = [line for line in printed.splitlines() if "NSAR" in line]
    assert [line[:16].strip() for line in lines] == ["dense", "M=1", "M=2 cut", "M=2 calibrated"]
    losses = [line.split("loss ")[1].split()[0] for line in lines]
    assert losses[0] == losses[1] != losses[2]
