"""Draw one decoder layer: python docs/figures/layer.py writes docs/figures/layer.svg.

The figure has a background of its own, so that it reads the same on light and on dark pages.
"""

from html import escape
from pathlib import Path

OUT = Path(__file__).with_suffix(".svg")
WIDTH, HEIGHT = 860, 400
INK, SOFT, LINE = "#1f2933", "#52606d", "#7b8794"
FILLS = {"norm": "#e4e7eb", "attention": "#d9e8f6", "expert": "#fdeec9", "gate": "#f9d0b4", "sublayer": "#f7f8fa"}
SIGMA, TIMES = "\N{GREEK SMALL LETTER SIGMA}", "\N{MULTIPLICATION SIGN}"
FONT = "font-family='Helvetica, Arial, sans-serif'"


def box(x: float, y: float, width: float, height: float, kind: str, *lines: str, size: int = 13) -> str:
    """A rectangle with centred lines of text."""
    first = y + height / 2 - (len(lines) - 1) * size * 0.62 + size * 0.35
    words = "".join(text(x + width / 2, first + i * size * 1.24, line, size=size) for i, line in enumerate(lines))
    return (
        f"<rect x='{x}' y='{y}' width='{width}' height='{height}' rx='7' fill='{FILLS[kind]}' stroke='{LINE}'/>{words}"
    )


def text(x: float, y: float, words: str, size: int = 13, fill: str = INK, anchor: str = "middle") -> str:
    where = f"x='{x}' y='{y}' text-anchor='{anchor}'"
    return f"<text {where} font-size='{size}' fill='{fill}' {FONT}>{escape(words)}</text>"


def path(*points: tuple[float, float], arrow: bool = True) -> str:
    """A line from point to point."""
    along = " ".join(f"{x},{y}" for x, y in points)
    end = " marker-end='url(#arrow)'" if arrow else ""
    return f"<polyline points='{along}' fill='none' stroke='{LINE}' stroke-width='1.6'{end}/>"


def circle(x: float, y: float, sign: str) -> str:
    return f"<circle cx='{x}' cy='{y}' r='11' fill='#fff' stroke='{LINE}'/>{text(x, y + 5, sign, size=15)}"


def layer() -> list[str]:
    """The upper row: attention, then M sub-layers, each with its own norm and residual connection."""
    y = 64
    parts = [text(20, 30, "One decoder layer", size=15, anchor="start"), text(26, y + 5, "h", size=16)]
    parts += [path((40, y), (80, y)), box(80, y - 17, 76, 34, "norm", "RMSNorm"), path((156, y), (178, y))]
    parts += [box(178, y - 17, 84, 34, "attention", "Attention"), path((262, y), (289, y))]
    parts += [path((56, y), (56, y + 34), (300, y + 34), (300, y + 11)), circle(300, y, "+"), path((311, y), (345, y))]
    for name, x in (("sub-layer 1", 345), ("sub-layer 2", 490), ("sub-layer M", 670)):
        parts.append(box(x, y - 22, 108, 44, "expert", name, "K experts"))
    parts += [path((453, y), (490, y)), path((598, y), (622, y)), text(634, y + 5, "…", size=18)]
    parts += [path((646, y), (670, y)), path((778, y), (826, y)), text(840, y + 5, "h", size=16)]
    return parts


def sublayer() -> list[str]:
    """The lower panel: one sub-layer, with what is computed for each expert."""
    top, middle = 132, 246
    dashes = f"stroke='{LINE}' stroke-dasharray='4 4'"
    parts = [
        f"<path d='M490 86 L24 {top} M598 86 L836 {top}' {dashes} fill='none'/>",
        f"<rect x='20' y='{top}' width='820' height='246' rx='10' fill='{FILLS['sublayer']}' {dashes}/>",
        text(36, top + 24, "One sub-layer: every expert runs for every token", size=15, anchor="start"),
        text(46, middle + 5, "h", size=16),
        path((58, middle), (92, middle)),
        box(92, middle - 17, 76, 34, "norm", "RMSNorm"),
        path((168, middle), (206, middle), arrow=False),
        text(186, middle - 8, "n", size=14, fill=SOFT),
    ]
    for name, y in (("1", 192), ("2", 246), ("K", 322)):
        parts += [
            path((206, middle), (206, y), (232, y)),
            box(232, y - 19, 226, 38, "expert", f"E_{name} = W_down (act(W_gate n) · W_up n)", size=12),
            path((458, y), (655, y)),
            path((480, y), (480, y + 20), (500, y + 20), arrow=False),
            box(500, y + 8, 116, 24, "gate", f"g_{name} = c {SIGMA}(⟨w_{name}, E_{name}⟩)", size=11),
            path((616, y + 20), (666, y + 20), (666, y + 11)),
            circle(666, y, TIMES),
            path((677, y), (722, y), (722, middle), (733, middle)),
        ]
    parts += [text(345, 294, "⋮", size=20), circle(744, middle, "Σ"), path((755, middle), (783, middle))]
    parts += [circle(794, middle, "+"), path((805, middle), (832, middle))]
    parts += [path((72, middle), (72, 364), (794, 364), (794, middle + 11))]
    parts.append(text(410, 358, "residual connection", size=11, fill=SOFT))
    return parts


def figure() -> str:
    head = (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT}' width='{WIDTH}' role='img' "
        "aria-label='A decoder layer: attention, then M sub-layers of K experts, each weighted by a gate of its own'>"
        "<defs><marker id='arrow' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='7' markerHeight='7' orient='auto'>"
        f"<path d='M0 0 L8 4 L0 8 z' fill='{LINE}'/></marker></defs>"
        f"<rect width='{WIDTH}' height='{HEIGHT}' rx='12' fill='#ffffff'/>"
    )
    return "\n".join([head, *layer(), *sublayer(), "</svg>\n"])


if __name__ == "__main__":
    OUT.write_text(figure(), encoding="utf-8")
