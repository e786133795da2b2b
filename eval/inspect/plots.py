"""Figures of what `inspect` has found, each readable at half a page's width."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .recorder import TAU

if TYPE_CHECKING:  # inspections are drawn without what comparisons want to be installed
    from ..compare.comparison import Row

Inspections = Mapping[str, Mapping[str, Any]]
SIZE = (6.0, 3.4)  # inches
COLOURS = ("#767676", "#0b6e99")  # the baseline, the model
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",  # text that stays text
    "svg.hashsalt": "finedeep",  # the same figure, the same bytes
}
MOST_LABELS = 24  # along an axis


def figures_of(inspections: Inspections) -> dict[str, Figure]:
    """All that can be drawn, by name. `inspections` holds the baseline, if there is one, before the model."""
    model = list(inspections.values())[-1]
    figures = {"activations": activations(inspections), "nsar": nsar(inspections)}
    if "gates" in model["places"][0]:
        figures |= {"gates": gates(model), "token_gates": token_gates(model)}
    return figures


def save(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Write each as PNG and SVG."""
    paths = []
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a script that the font does not have
        for name, figure in figures.items():
            for kind, more in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 200})):
                paths.append(folder / f"{name}.{kind}")
                figure.savefig(paths[-1], **more)
    return paths


def _figure(draw: Callable[[Figure, Any], None], height: float = SIZE[1]) -> Figure:
    with rc_context(STYLE):
        figure = Figure(figsize=(SIZE[0], height), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure, figure.add_subplot())
    return figure


def _colours(inspections: Inspections) -> tuple[str, ...]:
    return COLOURS[-len(inspections) :]


def differences(rows: Sequence["Row"]) -> Figure | None:
    """Main metrics that are shares of samples: the difference to the baseline, with its interval."""
    drawn = [row for row in rows if row.main and row.is_mean and row.difference and row.difference.low is not None]
    drawn.reverse()
    if not drawn:
        return None

    def draw(figure: Figure, axes: Any) -> None:
        axes.axvline(0, color="#767676", linewidth=1)
        for i, row in enumerate(drawn):
            d = row.difference
            axes.plot([d.low, d.high], [i, i], color=COLOURS[1], linewidth=2)
            axes.plot(d.difference, i, "o", color=COLOURS[1])
        axes.set_yticks(range(len(drawn)), [f"{row.place.task} ({row.place.metric})" for row in drawn])
        axes.set_ylim(-0.6, len(drawn) - 0.4)
        axes.set_xlabel("Finedeep less dense, with 95 % interval")

    return _figure(draw, 1.0 + 0.35 * len(drawn))


def activations(inspections: Inspections) -> Figure:
    """How often act(gate) has which value: the paper's first figure."""

    def draw(figure: Figure, axes: Any) -> None:
        for (name, found), colour in zip(inspections.items(), _colours(inspections), strict=True):
            counts = np.asarray(found["histogram"], float)
            share = counts / counts.sum()
            axes.stairs(share, found["edges"], color=colour, fill=False, linewidth=1.5, label=name)
        tau = float(TAU)
        axes.axvspan(-tau, tau, color="#000000", alpha=0.08, linewidth=0)
        axes.set_yscale("log")
        axes.set_xlabel(f"act(gate); grey: within {TAU} of zero, and so not counted by NSAR")
        axes.set_ylabel("share of all values")
        axes.legend(frameon=False)

    return _figure(draw)


def nsar(inspections: Inspections) -> Figure:
    """NSAR by layer; a Finedeep model's sub-layers as dots."""

    def draw(figure: Figure, axes: Any) -> None:
        for (name, found), colour in zip(inspections.items(), _colours(inspections), strict=True):
            layers = [layer["layer"] for layer in found["layers"]]
            axes.plot(layers, [100 * layer["nsar"][TAU] for layer in found["layers"]], color=colour, label=name)
            places = [p for p in found["places"] if p["sublayer"] or "gates" in p]
            axes.scatter(
                [p["layer"] for p in places],
                [100 * p["nsar"][TAU] for p in places],
                color=colour,
                s=14,
                label=f"{name}, single sub-layers" if places else None,
            )
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("layer")
        axes.set_ylabel(f"% of |act(gate)| > {TAU}")
        axes.legend(frameon=False, fontsize=9)

    return _figure(draw)


def gates(found: Mapping[str, Any]) -> Figure:
    """Mean gates, a row for each layer, a column for each expert."""
    M = 1 + max(place["sublayer"] for place in found["places"])
    rows = [place["gates"]["mean"] for place in found["places"]]
    table = np.asarray(rows).reshape(len(found["layers"]), -1)
    K, c = table.shape[1] // M, found["places"][0]["gates"]["c"]

    def draw(figure: Figure, axes: Any) -> None:
        image = axes.imshow(table, aspect="auto", cmap="viridis", vmin=0, vmax=c, interpolation="nearest")
        for m in range(1, M):
            axes.axvline(m * K - 0.5, color="white", linewidth=2)
        axes.set_xticks([m * K + (K - 1) / 2 for m in range(M)], [f"sub-layer {m + 1}: {K} experts" for m in range(M)])
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel("layer")
        figure.colorbar(image, ax=axes, label="mean gate")

    return _figure(draw, min(6.0, max(2.4, 1.2 + 0.22 * len(table))))


def token_gates(found: Mapping[str, Any]) -> Figure:
    """The gates along the text's beginning, in the layer where they move most."""
    table = np.asarray(found["token_gates"])  # (tokens, layer, M, K)
    layer = int(table.std(0).mean((1, 2)).argmax())
    rows = table[:, layer].reshape(len(table), -1).T  # (M K, tokens)
    M, c = table.shape[2], found["places"][0]["gates"]["c"]

    def draw(figure: Figure, axes: Any) -> None:
        image = axes.imshow(rows, aspect="auto", cmap="viridis", vmin=0, vmax=c, interpolation="nearest")
        for m in range(1, M):
            axes.axhline(m * len(rows) / M - 0.5, color="white", linewidth=2)
        axes.set_xticks(range(len(table)), [_label(token) for token in found["tokens"]], rotation=90, fontsize=8)
        step = math.ceil(len(rows) / MOST_LABELS)
        names = [f"{m + 1}.{k + 1}" for m in range(M) for k in range(table.shape[3])]
        axes.set_yticks(range(0, len(rows), step), names[::step], fontsize=8)
        axes.set_ylabel("sub-layer.expert")
        axes.set_title(f"layer {layer}", fontsize=10)
        figure.colorbar(image, ax=axes, label="gate")

    return _figure(draw, min(6.0, max(3.0, 1.8 + 0.16 * len(rows))))


def _label(token: str) -> str:
    return token.replace("\n", "\\n").replace("$", r"\$")[:12] or " "
