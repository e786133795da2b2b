"""README's table of results, from what is committed: python examples/summary.py writes it there.

Each row is a question that somebody with a checkpoint asks, and says where its figures come from.
"""

import json
import statistics
from collections.abc import Iterable

import from_checkout
from continued import BASE, best_of, over, read_continued
from finedeep.benchmarks import gap, results
from finedeep.benchmarks.documents import put_table
from larger import best_of as best_rate
from larger import mean as mean_loss
from larger import read_larger

ROOT = from_checkout.ROOT
BENCHMARKS = ROOT / "benchmarks"
REAL = ROOT / "examples" / "results" / "real.json"
HEAD = ["question", "answer", "page"]


def gap_row() -> list[str]:
    """What a plain cut costs, and what calibration and healing bring back: means over the seeds of the best options."""
    lines = [json.loads(line) for line in gap.RESULTS.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if (line["model"], line["shape"], line["source"]) == ("stories260k", "2x8", "self")]
    over = {}
    for mean, found in sorted(gap.groups_of(lines), key=lambda group: (gap.seeds_of(group[1]), -group[0]["loss"])):
        over[mean["stage"]] = mean["loss"] - mean["dense"]
        over["cut"] = mean["cut"] - mean["dense"]
        share = statistics.mean(1 - gap.left_of(line) for line in found)
        over[f"{mean['stage']}, share"] = share
    answer = (
        f"Plain cut: +{over['cut']:.2f} nats per token. Calibrated: +{over['layer by layer']:.2f}. Healed for minutes: "
        f"+{over['healed']:.2f} ({over['healed, share']:.0%} of the gap closed). `stories260k`, 0.26M parameters, on "
        "2 CPU cores"
    )
    return ["And on a small model that was healed too?", answer, "[Calibrate and heal](docs/heal.md)"]


def exact_row() -> list[str]:
    """M=1 beside dense on the real model: losses on texts that it was not made with, and logits."""
    found = json.loads(REAL.read_text(encoding="utf-8"))
    losses = found["models"]["M=1 K=8"]["losses"]
    said = ", ".join(f"{text} {x['loss']:.3f} (dense {x['dense_loss']:.3f})" for text, x in losses.items())
    most = max(x["largest_logit_difference"] for x in losses.values())
    answer = (
        f"SmolLM2-135M, {found['weights']}: nats per token on {said}; logits differ by {most:.1g} at most, in float32"
    )
    return ["Is a conversion with M=1 K=8 exact?", answer, "[A real model](docs/real.md)"]


def real_cut_row() -> list[str]:
    """What cuts of the real model cost, over dense, in the order in which they were made."""
    models = json.loads(REAL.read_text(encoding="utf-8"))["models"]
    said = []
    for name, found in models.items():
        if name.startswith("M=2") and "losses" in found:
            over = ", ".join(f"{x['loss'] - x['dense_loss']:+.2f} on {text}" for text, x in found["losses"].items())
            said.append(f"{name.removeprefix('M=2 K=8, ')}: {over}")
    return [
        "What does M=2 K=8 cost there?",
        f"Nats per token over dense. {'; '.join(said)}",
        "[A real model](docs/real.md)",
    ]


def speed_row(kind: str, question: str, cases: Iterable[tuple[str, str]]) -> list[str]:
    """Ratios to dense Llama at M=2 K=8, as benchmarks/results.py judges them."""
    content = results.load(BENCHMARKS)[kind]
    found = {label: cells[results.CUTS.index((2, 8))] for label, _, _, cells in results.targets(content)}
    said = ", ".join(f"{words} {found[label]:.2f}" for label, words in cases)
    on_gpu = kind == "cuda"
    where = content["machine"]["device"] if on_gpu else f"{content['machine']['threads']} CPU cores"
    how = "1.2B parameters, bfloat16, an earlier version of the model" if on_gpu else "float32"
    return [question, f"Time over dense Llama, M=2 K=8: {said}. {where}, {how}", "[Performance](docs/performance.md)"]


def claim_row() -> list[str]:
    """The largest runs, with few tokens and with many; only the few have the second baseline."""
    sizes = read_larger(ROOT / "examples" / "logs")

    def losses(size: str, models: dict[str, str]) -> str:
        best = {name: best_rate(sizes[size][model])[1].values() for model, name in models.items()}
        return ", ".join(f"{name} {mean_loss(runs, 'held_out'):.3f}" for name, runs in best.items())

    norm = {"dense": "dense", "dense-sandwich-norm": "dense with a second norm"}
    deep = {"m-1-k-16-sandwich-norm": "M=1 K=16 with it", "m-2-k-8-sandwich-norm": "M=2 K=8 with it"}
    answer = (
        "Against plain dense, with a second norm, yes; but the gain is the norm's. Held-out loss: "
        f"31M parameters, 15M tokens, one seed: {losses('31m, 15M tokens', norm | deep)}; 60M tokens, one seed: "
        f"{losses('31m, 60M tokens, trial', {'dense': 'dense', 'm-2-k-8-sandwich-norm': 'M=2 K=8 with the norm'})}. "
        f"1M parameters, three seeds: {losses('1m, 1.6M tokens', norm | deep)}"
    )
    return ["Is it better when trained from scratch?", answer, "[Train](docs/train.md)"]


def continued_row() -> list[str]:
    """Over the dense checkpoint that was trained on as long, on held-out text; models of its size, and grown ones."""
    found = read_continued(ROOT / "examples" / "logs")
    size, models = next((size, models) for size, models in found.items() if size.startswith("260k"))
    best = {model: best_of(models[model]) for model in (BASE, *CONTINUED) if model in models}
    said = ", ".join(
        f"{words} {over(best[model], best[BASE], 'held_out')}" for model, words in CONTINUED.items() if model in best
    )
    seeds = min(map(len, best.values()))
    size_of_real, real = next((size, models) for size, models in found.items() if size.startswith("135m"))
    of_real = {model: best_of(real[model]) for model in ("dense", *OF_REAL_MODEL) if model in real}
    answer = (
        "No, as far as measured. Held-out loss over dense's: "
        f"`stories260k`, {size.partition(', ')[2]}, {seeds} seed{'s' * (seeds > 1)}: {said}; "
        f"SmolLM2-135M (from Q4_1), {size_of_real.partition(', ')[2]}, one seed: "
        + ", ".join(
            f"{words} {over(of_real[model], of_real[BASE], 'held_out')}" for model, words in OF_REAL_MODEL.items()
        )
    )
    return ["Does it learn more when a checkpoint is trained on?", answer, "[Train](docs/train.md)"]


CONTINUED = {
    "m-1-k-8": "M=1 K=8",
    "m-2-k-8-healed": "M=2 K=8 healed",
    "grow-m-2-k-8": "grow",
    "dense-wider": "dense, wider",
}


OF_REAL_MODEL = {
    "m-1-k-8": "M=1 K=8",
    "m-1-k-8-slow-routers": "with slow routers",
    "m-2-k-8-calibrated": "M=2 K=8 calibrated",
}


def table() -> str:
    rows = [
        exact_row(),
        real_cut_row(),
        gap_row(),
        speed_row(
            "cuda",
            "How fast is it on a GPU?",
            [
                ("training step 4x2048", "training"),
                ("prefill 8x512", "prefill of 8x512"),
                ("prefill 1x2048", "of 1x2048"),
                ("decode, batch 1, CUDA graph", "decoding"),
            ],
        ),
        speed_row(
            "cpu-quick",
            "And on a CPU?",
            [
                ("training step 1x256", "training"),
                ("prefill 1x1024", "prefill of 1x1024"),
                ("decode, batch 1, eager", "decoding"),
            ],
        ),
        claim_row(),
        continued_row(),
    ]
    return results.markdown(HEAD, rows, len(HEAD))


if __name__ == "__main__":
    put_table("summary", table())
