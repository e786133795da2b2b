"""The page of `make real`, from its results."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finedeep.benchmarks.documents import put_table
from finedeep.eval.compare.table import aligned_markdown

Results = Mapping[str, Any]


def write_page(results: Results, page: Path) -> None:
    """Put each table between its marks."""
    for mark, (head, rows) in TABLES.items():
        found = [*rows(results)]
        put_table(f"real-{mark}", aligned_markdown(head, found, 1) if found else "Not measured yet.", page)


def losses(results: Results) -> Iterator[list[str]]:
    """A row for each model and text."""
    for name, found in results["models"].items():
        cut = results["models"].get("M=2 K=8, cut", {}).get("losses", {})
        for text, x in found.get("losses", {}).items():
            over, gap = x["loss"] - x["dense_loss"], ""
            if name.endswith((", calibrated", ", healed")) and text in cut:
                gap = f"{1 - over / (cut[text]['loss'] - cut[text]['dense_loss']):.1%}"
            yield [
                name,
                text,
                f"{x['tokens']:,}",
                f"{x['dense_loss']:.4f}",
                f"{x['loss']:.4f}",
                f"{over:+.4f}",
                gap,
                f"{x['kl']:.2g}",
                f"{x['largest_logit_difference']:.2g} of {x['largest_logit']:.0f}",
                f"{x['first_choice_differs']:.2%}",
            ]


def healing(results: Results) -> Iterator[list[str]]:
    """The teacher's text held out, as training went on."""
    for name, found in results["models"].items():
        measured = {x["step"]: x for x in found.get("healing", []) if "eval_divergence" in x}  # the end is twice
        for step, x in measured.items():
            seen = x.get("num_input_tokens_seen", 0)
            yield [name, f"{step}", f"{seen:,}", f"{x['eval_divergence']:.4f}", f"{x['eval_next_token']:.4f}"]


def making(results: Results) -> Iterator[list[str]]:
    """What each model took to make."""
    for name, found in results["models"].items():
        if x := found.get("convert"):
            made = found["made_with"]["convert"]
            took = "" if "seconds" not in x else f"{x['seconds']:.0f} ({x['cpu_seconds']:.0f} of a core)"
            memory = "" if "peak_bytes" not in x else f"{x['peak_bytes'] / 1e9:.2f} GB"
            load = f"{made['threads']} of {made['cores']}, load {made['load']}"
            yield [name, f"`{' '.join(x['options'])}`", f"{x['weight_bytes'] / 1e6:.0f} MB", took, memory, load]


def texts(results: Results) -> Iterator[list[str]]:
    """How many answers are the dense model's, word for word, and the first that is not."""
    for name, found in results["models"].items():
        if x := found.get("texts"):
            same = sum(pair["dense"] == pair["finedeep"] for pair in x)
            sample = next((pair for pair in x if pair["dense"] != pair["finedeep"]), x[0])
            yield [name, f"{same} of {len(x)}", *(shortened(sample[which]) for which in ("dense", "finedeep"))]


def shortened(text: str) -> str:
    """A text that fits into a table's cell."""
    return " ".join(text.split()).replace("|", "\\|")[:160]


def activations(results: Results) -> Iterator[list[str]]:
    """NSAR by threshold, dense and converted."""
    for name, found in results["models"].items():
        if x := found.get("activations"):
            for tau, rate in x["finedeep"]["nsar"].items():
                yield [name, x["text"], tau, f"{x['dense']['nsar'][tau]:.2%}", f"{rate:.2%}"]


def precisions(results: Results) -> Iterator[list[str]]:
    """Losses in less than float32."""
    for name, found in results["models"].items():
        if x := found.get("precisions"):
            for precision, loss in x["finedeep"].items():
                dense = x["dense"][precision]
                cells = (f"{value:.4f}" for value in (dense, loss))
                yield [name, x["text"], f"{x['tokens']:,}", precision, *cells, f"{loss - dense:+.4f}"]


def benchmarks(results: Results) -> Iterator[list[str]]:
    """Scores, and the differences with their intervals."""
    for name, found in results["models"].items():
        for row in found.get("benchmarks", {}).get("rows", []):
            difference = row["difference"] or {}
            if row["main"] and difference.get("low") is not None:
                interval = f"{difference['difference']:+.2%} ({difference['low']:+.2%} to {difference['high']:+.2%})"
                values = [f"{row[which]['value']:.2%}" for which in ("baseline", "model")]
                yield [name, row["task"], str(difference["samples"]), *values, interval]


TABLES = {
    "losses": (
        "model, text, tokens, dense, Finedeep, over dense, of the gap closed, KL from dense, "
        "largest difference of logits, first choice differs".split(", "),
        losses,
    ),
    "healing": (["model", "step", "tokens seen", "KL from dense, held out", "its next-token loss"], healing),
    "making": (["model", "options", "weights", "seconds", "peak memory", "threads of cores"], making),
    "texts": (["model", "equal answers", "dense, for example", "Finedeep"], texts),
    "activations": (["model", "text", "threshold", "NSAR dense", "NSAR Finedeep"], activations),
    "precisions": (["model", "text", "tokens", "weights", "dense", "Finedeep", "over dense"], precisions),
    "benchmarks": (["model", "task", "questions", "dense", "Finedeep", "difference (95 %)"], benchmarks),
}
