"""The figure of `make real`: how often act(gate) has which value in a real model, as in the paper's first figure."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

SHOWN = "M=2 K=8, calibrated"
NAME = "real-activations"


def draw(results: Mapping[str, Any], folder: Path) -> Path | None:
    """Draw the dense model and the calibrated one, as SVG into the folder, where they have been looked into."""
    from finedeep.eval.inspect.plots import STYLE, activations
    from matplotlib import rc_context

    found = results["models"].get(SHOWN, {}).get("activations")
    if not found:
        return None
    path = folder / f"{NAME}.svg"
    with rc_context(STYLE):
        activations({"dense": found["dense"], SHOWN: found["finedeep"]}).savefig(path, metadata={"Date": None})
    return path
