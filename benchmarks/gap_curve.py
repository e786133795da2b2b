"""The figure of what is left of the gap: against the tokens learnt from, and against the seconds it took."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..convert.plan import LEAST_TOKENS
from ..eval.inspect.plots import COLOURS, STYLE

MARKERS = {"closed form": "^", "layer by layer": "o", "healed": "s", "healed longer": "D"}


def tokens_of(line: dict[str, Any]) -> int:
    """How many tokens a line's own command learns from: of healing those of all steps, a token counting each time.

    Lines from before healing chose its steps by the model's size give all that decides it.
    """
    if "tokens_learnt" in line:
        return line["tokens_learnt"]
    given = {name.replace("-", "_"): int(n) for name, n in re.findall(r"--([a-z-]+) (\d+)(?= |$)", line["command"])}
    if " heal " in line["command"]:
        return math.prod(given[name] for name in ("steps", "batch_size", "context"))
    return given.get("calibration_tokens", LEAST_TOKENS)


def left_of(line: dict[str, Any]) -> float:
    """The share of the gap that is not closed."""
    return (line["loss"] - line["dense"]) / (line["cut"] - line["dense"])


def draw(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Every run on sampled text that is in `lines`, all of one model and shape, as an SVG."""
    lines = [line for line in lines if line["source"] == "self"]
    wanted = {"92 % closed": 8, "0.02 nats": 100 * 0.02 / (lines[0]["cut"] - lines[0]["dense"])}  # % of the gap left
    without, other = COLOURS
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 3.4), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, 2, sharey=True)
        sides = {"tokens learnt from": tokens_of, "seconds, times cores": lambda x: x["seconds"] * x["threads"]}
        for axes, (label, x) in zip(panels, sides.items(), strict=True):
            for name, y in wanted.items():
                axes.axhline(y, color="#bbbbbb", linewidth=1)
                axes.annotate(name, (0.01, y), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
            for stage, marker in MARKERS.items():
                found = [line for line in lines if line["stage"] == stage]
                colours = [without if "--hidden-states 0" in line["command"] else other for line in found]
                axes.scatter(
                    [x(line) for line in found], [100 * left_of(line) for line in found], 22, colours, marker=marker
                )
                axes.scatter([], [], 22, other, marker=marker, label=stage)
            axes.set(xscale="log", yscale="log", xlabel=f"{label} (logarithmic)")
            axes.set_yticks([2, 5, 10, 20, 50], ["2", "5", "10", "20", "50"], minor=False)
            axes.minorticks_off()
        panels[0].set_ylabel("% of the gap left (logarithmic)")
        panels[1].scatter([], [], 22, without, marker="s", label="without hidden states")
        figure.legend(*panels[1].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
        figure.savefig(path, metadata={"Date": None})
