"""From what was measured (results/*.json) to what is read: RESULTS.md, the plot, the README's summary."""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from finedeep_files.timing import quartiles, ratios

from .cases import CUTS

Row = dict[str, Any]

# What the project set out to reach, for each kind of device: which rows, whose time over whose, and the limit, an upper
# one for Finedeep over dense, a lower one for the loop over Finedeep.
PLAIN = {"dtype": "float32", "shape": "31M", "compiled": False, "checkpointing": False, "cache": "dynamic"}
LARGE = PLAIN | {"dtype": "bfloat16", "shape": "1.2B"}
SMALL = PLAIN | {"shape": "28M"}
GRAPH = {"compiled": True, "cache": "static"}
COMPILED = {"compiled": True}
TARGETS: dict[str, list[tuple[str, Row, str, float]]] = {
    "cpu": [
        ("prefill 1x2048", PLAIN | {"work": "prefill", "batch": 1}, "finedeep / dense", 1.03),
        ("prefill 8x512", PLAIN | {"work": "prefill", "batch": 8}, "finedeep / dense", 1.03),
        ("training step", PLAIN | {"work": "train"}, "finedeep / dense", 1.05),
        ("decode, batch 1, eager", PLAIN | {"work": "decode", "batch": 1}, "finedeep / dense", 1.15),
        ("decode, batch 1, compiled", PLAIN | GRAPH | {"work": "decode", "batch": 1}, "finedeep / dense", 1.05),
        ("the loop's prefill 1x2048", PLAIN | {"work": "prefill", "batch": 1}, "loop / finedeep", 1.2),
        ("the loop's decode, batch 1", PLAIN | {"work": "decode", "batch": 1}, "loop / finedeep", 1.6),
    ],
    "cpu-quick": [
        ("prefill 1x1024", SMALL | {"work": "prefill", "batch": 1}, "finedeep / dense", 1.02),
        ("decode, batch 1, eager", SMALL | {"work": "decode", "batch": 1}, "finedeep / dense", 1.10),
        ("training step 1x256", SMALL | {"work": "train", "batch": 1}, "finedeep / dense", 1.05),
    ],
    "cuda": [
        ("prefill 1x2048", LARGE | {"work": "prefill", "batch": 1}, "finedeep / dense", 0.97),
        ("prefill 8x512", LARGE | {"work": "prefill", "batch": 8}, "finedeep / dense", 0.97),
        ("prefill 1x2048, compiled", LARGE | COMPILED | {"work": "prefill", "batch": 1}, "finedeep / dense", 1.03),
        ("training step 4x2048", LARGE | {"work": "train", "batch": 4}, "finedeep / dense", 1.00),
        ("training step 4x2048, compiled", LARGE | COMPILED | {"work": "train", "batch": 4}, "finedeep / dense", 1.03),
        ("decode, batch 1, CUDA graph", LARGE | GRAPH | {"work": "decode", "batch": 1}, "finedeep / dense", 1.05),
        ("decode, batch 64, CUDA graph", LARGE | GRAPH | {"work": "decode", "batch": 64}, "finedeep / dense", 1.03),
    ],
}
MEMORY_LIMIT = {"cpu": 1.05, "cpu-quick": 1.05, "cuda": 1.00}
LOAD_LIMIT = 1.10


def rows_of(content: dict, group: str) -> list[Row]:
    """The measured rows of a group."""
    return [row for row in content["rows"] if row["group"] == group]


def ratio_of(row: Row, contender: str = "finedeep", yardstick: str = "dense") -> tuple[float, float, float]:
    """Quartiles of the contender's time over the yardstick's, in the same round."""
    return quartiles(ratios(row["seconds"][contender], row["seconds"][yardstick]))


def shown(values: tuple[float, float, float]) -> str:
    """A median with its quartiles."""
    low, middle, high = values
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def duration(seconds: Iterable[float]) -> str:
    """A median time in a readable unit."""
    median = statistics.median(seconds)
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if median >= size:
            return f"{median / size:.3g} {unit}"
    return f"{median / 1e-6:.3g} µs"


def markdown(head: list[str], rows: list[list[str]], right_from: int) -> str:
    """A Markdown table whose columns from `right_from` on are numbers."""
    lines = [head, ["---" if i < right_from else "---:" for i in range(len(head))], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def title_of(case: Row) -> str:
    """What a case is, in words."""
    words = {
        "prefill": f"prefill {case['batch']}x{case['tokens']}",
        "decode": f"decode, batch {case['batch']}, {case['cache']} cache",
        "train": f"train {case['batch']}x{case['tokens']}" + (", checkpointing" if case["checkpointing"] else ""),
    }
    return words[case["work"]]


def model_table(content: dict) -> str:
    """Whole models: seconds of dense, ratios of Finedeep and the loop."""
    rows = []
    for row in rows_of(content, "model"):
        case = row["case"]
        rows.append(
            [
                title_of(case),
                case["shape"],
                f"{case['M']}x{case['K']}",
                case["dtype"],
                "compiled" if case["compiled"] else "eager",
                duration(row["seconds"]["dense"]),
                shown(ratio_of(row)),
                shown(ratio_of(row, "loop")) if "loop" in row["seconds"] else "",
                f"{ratio_of(row, 'loop', 'finedeep')[1]:.2f}" if "loop" in row["seconds"] else "",
            ]
        )
    head = ["work", "model", "MxK", "dtype", "", "dense", "Finedeep / dense", "loop / dense", "loop / Finedeep"]
    return markdown(head, rows, 5)


def memory_table(content: dict) -> str:
    """Peak memory, in processes of their own."""
    rows = []
    for row in rows_of(content, "memory"):
        case, peaks = row["case"], row["bytes"]
        cells = [title_of(case), case["shape"], f"{case['M']}x{case['K']}", case["dtype"]]
        cells.append(f"{peaks['dense'] / 1e9:.2f} GB")
        cells += [f"{peaks[name] / peaks['dense']:.3f}" if name in peaks else "" for name in ("finedeep", "loop")]
        rows.append(cells)
    head = ["work", "model", "MxK", "dtype", "dense", "Finedeep / dense", "loop / dense"]
    return markdown(head, rows, 4)


def start_table(content: dict) -> str:
    """Import, loading, conversion."""
    rows = []
    for row in rows_of(content, "start"):
        base, *others = row["seconds"]
        for other in others:
            ratio = shown(ratio_of(row, other, base))
            rows.append([row["case"]["work"], f"{other} / {base}", duration(row["seconds"][base]), ratio])
    return markdown(["", "", "the second", "ratio"], rows, 2)


def growth_tables(content: dict) -> str:
    """The curves, one table each."""
    tables = []
    rows = rows_of(content, "growth")
    for along in dict.fromkeys(row["case"]["along"] for row in rows):
        field = {"tokens": "tokens", "K": "K", "M": "M", "d": "hidden_size"}[along.split(",")[0]]
        curve = [row for row in rows if row["case"]["along"] == along]
        fixed = curve[0]["case"]
        names = {"tokens": "tokens", "M": "M", "K": "K", "hidden_size": "d"}
        with_what = ", ".join(f"{label} = {fixed[key]}" for key, label in names.items() if key != field)
        kinds = [kind for kind in curve[0]["seconds"] if kind != "dense"]
        body = [
            [str(row["case"][field]), duration(row["seconds"]["dense"]), *(shown(ratio_of(row, k)) for k in kinds)]
            for row in curve
        ]
        head = [names[field], "dense", *(f"{KINDS[kind]} / dense" for kind in kinds)]
        tables.append(f"**{along}** ({with_what})\n\n" + markdown(head, body, 1))
    return "\n\n".join(tables)


def targets(content: dict) -> list[tuple[str, str, float, list[float | None]]]:
    """Of each target its name, what is divided by what, the limit, and what was measured for each of `CUTS`."""
    kind = content["machine"]["kind"]
    table = []
    for label, wanted, quotient, limit in TARGETS[kind]:
        contender, yardstick = quotient.split(" / ")
        cells = []
        for M, K in CUTS:
            found = [row for row in rows_of(content, "model") if fits(row["case"], wanted | {"M": M, "K": K})]
            cells.append(ratio_of(found[0], contender, yardstick)[1] if found else None)
        table.append((label, quotient, limit, cells))
    peaks = []
    for M, K in CUTS:
        wanted = {"work": "train", "M": M, "K": K, "checkpointing": False, "dtype": TARGETS[kind][0][1]["dtype"]}
        found = [row["bytes"] for row in rows_of(content, "memory") if fits(row["case"], wanted)]
        peaks.append(found[0]["finedeep"] / found[0]["dense"] if found else None)
    table.append(("peak memory of training", "finedeep / dense", MEMORY_LIMIT[kind], peaks))
    loads = [ratio_of(row)[1] for row in rows_of(content, "start") if row["case"]["work"].startswith("from_pretrained")]
    if loads:
        table.append(("`from_pretrained`", "finedeep / dense", LOAD_LIMIT, [None, loads[0], None, None]))
    return table


def targets_table(content: dict) -> str:
    """Each target beside what was measured, by M and K; what misses its limit is set in bold."""
    rows = [
        [label, quotient, f"{'≥' if quotient.startswith('loop') else '≤'} {limit:.2f}"]
        + [judged(value, limit, quotient.startswith("loop")) for value in cells]
        for label, quotient, limit, cells in targets(content)
    ]
    return markdown(["", "ratio", "target", *(f"M={M} K={K}" for M, K in CUTS)], rows, 2)


def judged(value: float | None, limit: float, at_least: bool) -> str:
    """A ratio, in bold where it is on the wrong side of its limit."""
    if value is None:
        return ""
    missed = round(value, 2) < limit if at_least else round(value, 2) > limit
    return f"**{value:.2f}**" if missed else f"{value:.2f}"


def fits(case: Row, wanted: Row) -> bool:
    """Whether the case has all the wanted values."""
    return all(case[key] == value for key, value in wanted.items())


def plot(content: dict, path: Path) -> None:
    """The ratio to dense against tokens, K, M and d: medians, and quartiles as bands."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "finedeep"
    from matplotlib import pyplot

    curves = {"tokens": "tokens", "K": "K", "M": "M", "d": "hidden_size"}
    figure, axes = pyplot.subplots(1, 4, figsize=(12, 3), sharey=True, layout="constrained")
    for axis, (along, field) in zip(axes, curves.items(), strict=True):
        rows = [row for row in rows_of(content, "growth") if row["case"]["along"] == along]
        for kind, colour in (("loop", "#b0602a"), ("finedeep", "#20608f")) if rows else ():
            low, middle, high = zip(*(ratio_of(row, kind) for row in rows), strict=True)
            x = [row["case"][field] for row in rows]
            axis.plot(x, middle, marker="o", markersize=3, color=colour, label=KINDS[kind])
            axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_xlabel(along if along != "d" else "d (hidden size)")
        axis.grid(alpha=0.3)
    axes[0].set_ylim(bottom=0.8)
    axes[0].set_ylabel("time / dense")
    axes[0].legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


KINDS = {"finedeep": "Finedeep", "loop": "loop", "definition": "`definition`", "one_product": "`one_product`"}


def machine_line(content: dict) -> str:
    """Where and with what it was measured."""
    machine, versions = content["machine"], content["versions"]
    versions_text = ", ".join(f"{name} {version}" for name, version in versions.items())
    line = f"{machine['device']}, {machine['threads']} threads; {versions_text}; `{content['command']}`."
    for dtype, difference in content["difference"].items():
        line += f" In {dtype}, logits of Finedeep and of the loop differ by {difference:.1g} of the largest at most."
    counts = content["parameters"].items()
    sizes = ", ".join(f"{name} {of['dense']:,} ({of['finedeep'] - of['dense']:,} more)" for name, of in counts)
    return f"{line} Parameters of the dense models, and how many more Finedeep with M=2 K=8 has: {sizes}."


SECTIONS = {
    "Targets": ("model", targets_table),
    "Whole models": ("model", model_table),
    "Peak memory": ("memory", memory_table),
    "Starting": ("start", start_table),
    "How the cost grows": ("growth", growth_tables),
}
PREFACE = """# As fast as the dense model?

Made by `python -m finedeep.benchmarks` from the measurements in `results/`. Three models do the same work: dense
Llama of transformers; Finedeep with the same sizes, its FFN cut into M sub-layers of K experts; and *loop*, the same
Finedeep whose experts are modules of their own that run one after the other, as in most mixture-of-experts code. They
take turns (A B C A B C), and a ratio is that of two times in the same round. Shown is the median, and in brackets the
quartiles over the rounds. Weights are random, routers too. Attention is SDPA. In decoding, a time is that of one new
token for every sequence of the batch, after a context of 128 tokens; a training step is forward, backward and AdamW."""


def render(output: Path) -> list[Path]:
    """Make OUTPUT/RESULTS.md and its plots from everything that was measured. Returns what was written."""
    contents = load(output)
    written = []
    parts = [PREFACE.strip()]
    for kind, name in NAMES.items():
        if kind not in contents:
            device, _, short = kind.partition("-")
            words = f"--device {device}" + (" --quick" if short else "")
            parts.append(f"## {name}\n\nNot yet measured: `python -m finedeep.benchmarks {words}` does it.")
            continue
        content = contents[kind]
        parts.append(f"## {name}\n\n{machine_line(content)}")
        for section, (group, table) in SECTIONS.items():
            if not rows_of(content, group):
                continue
            parts.append(f"### {section}\n\n{table(content)}")
            if (kind, section) in REASONS:
                parts.append(REASONS[kind, section])
        if rows_of(content, "growth"):
            written.append(output / "results" / f"ratio-{kind}.svg")
            plot(content, written[-1])
            parts.append(f"![time over dense, against tokens, K, M and d](results/{written[-1].name})")
    written.append(output / "RESULTS.md")
    written[-1].write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return written


# Why what misses its target does; the tables beside it hold the figures.
REASONS = {
    (
        "cpu",
        "Targets",
    ): """**What misses, and why.**

- *Eager decoding of one token, the more the larger M.* A sub-layer is some thirty operators, its norm's included, and
  an operator costs Python and torch the same few microseconds whatever its size: about a tenth of a millisecond for
  each sub-layer and token. That is much at d = 512, where a dense layer's whole work is two milliseconds, and less
  the larger the model is (98M and 325M below; "d, one token"). Compiled, the operators are fused and it is gone.
- *The loop.* It cannot be slower over Finedeep than it is over dense, give or take what Finedeep costs itself. With 8
  experts its matrices are still large enough for two cores to be busy with them, so that it loses little in prefill
  and training; it falls behind with K ("K" below, and 2x32 in the table of models). Decoding reads the same weights
  in all three, and on this machine that reading is most of the time.
- *Memory at M = 4.* Backward needs the input of each sub-layer and the output of its norm, 2 d numbers a token, M
  times where a dense layer needs them once. Everything else is kept as by the dense FFN or less. Gradient
  checkpointing takes it away, as with Llama.
- *Training with gradient checkpointing* has no target of its own and costs more over dense than training without it
  (the rows "checkpointing" below). Why has not been found.
- *Loading.* With the files in the page cache it is Python that takes the time: a module is made and a tensor put into
  its place, 15 of them a layer with M = 2 where Llama has 9. That is some milliseconds a layer, whatever the sizes.
  `remote code` has the import of the model's code, and of what that imports from transformers, in its time; the other
  two have imported theirs before.""",
    (
        "cpu",
        "How the cost grows",
    ): """**What is not flat, and why.**

- *From 8,192 tokens on.* A tensor of activations is then larger than 32 MB, and glibc takes such memory anew from the
  operating system and gives it back each time; Finedeep's scores and weighted activations are two such tensors more.
  With `MALLOC_MMAP_THRESHOLD_` and `MALLOC_TRIM_THRESHOLD_` set to some gigabytes the difference is gone.
- *Small d, large M, large K at one token.* The operators between the matrix products cost the same whatever d is, and
  there are M times as many of them; K outputs of length d are read and written for a token.""",
}
REASONS["cuda", "Targets"] = """Measured with the model as of commit `c7a6254`. **What misses, and why.**

- *Prefill of 1x2048, eager.* Here the CPU sets the pace: it takes longer to issue the operators than the GPU to run
  them. Finedeep issues some thirty more for each sub-layer after the first. With twice the tokens (8x512) and in
  training the GPU sets the pace, and M = 2 is faster than dense Llama: one Triton kernel does what dense does in two
  operators, and another does what Llama's RMSNorm does in seven. M = 4 at 8x512 still waits for the CPU.
- *Compiled prefill.* Inductor fuses the dense model's element-wise work too, so that advantage is gone. What remains is
  one more reading of W_down for the scores, one more norm and sum for each sub-layer, and narrower matrix products.
- *Decoding in a CUDA graph.* A token's work is a chain of small kernels, of which M = 2 has twice as many in the FFN,
  each with half the weights to read. Score vectors that are computed once and kept would save part of it; they would
  also go stale when somebody changes a weight.
- The rows for which the deadline left no time are not in the table."""
REASONS["cpu-quick", "Targets"] = """Measured with the model as of commit `c4723ce`, on a shared machine whose rounds
differ by a tenth: quartiles are in the tables below. **What misses, and why.**

- *Prefill and training.* What lies between the products is done in fewer passes than dense Llama's, in Llama's order.
  What remains is a norm, a sum and scores for each sub-layer, one more reading of W_down, whose gradient the scores add
  to, and narrower products.
- *Decoding of one token* reads W_down once, as the dense model does: score vectors are kept with the cache of keys and
  values. What remains is the time that Python takes to call some fifteen operators for each sub-layer, while two cores
  need a few dozen microseconds for the products themselves. With one thread, where the products take twice as long, it
  weighs half as much.
- *Memory at M = 4*: a stream and its norm for each sub-layer are kept for backward."""
NAMES = {"cuda": "GPU", "cpu-quick": "CPU, in short", "cpu": "CPU, in full (version 0.1.0)"}


def saved(output: Path, kind: str) -> Path:
    """Where the results of a kind of device are."""
    return output / "results" / f"speed-{kind}.json"


def load(output: Path) -> dict[str, dict]:
    """What has been measured so far, by kind of device."""
    return {kind: json.loads(saved(output, kind).read_text()) for kind in NAMES if saved(output, kind).exists()}
