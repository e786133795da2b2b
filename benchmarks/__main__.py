"""Measure dense Llama, Finedeep and a loop over experts at the same work, taken in turn, and write the results down."""

import argparse
import importlib.util
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from finedeep_files import timing
from finedeep_files.processor import processor
from tqdm import tqdm

from ..configuration_finedeep import __version__
from . import cases, growth, memory, quick, results, serving, starting
from .documents import check_marks, put_table
from .models import DTYPES, SHAPES, largest_difference, parameters_of

Job = tuple[str, dict[str, Any], Callable[[], dict[str, Any]]]
DESCRIPTION = f"""{__doc__}

Models are built here with random weights; nothing is downloaded. Times are medians over rounds in which each model has
its turn; ratios are taken within a round. Leave the machine alone meanwhile. Results are saved after each case to
OUTPUT/results, and --resume continues where a run was stopped; OUTPUT/RESULTS.md and the plot are made at the end."""
EPILOG = """examples:
  python -m finedeep.benchmarks                                    all cases (about an hour on two cores)
  python -m finedeep.benchmarks --only decode,memory --seconds 5   a first look at two of the groups
  python -m finedeep.benchmarks --serving --threads 1              how fast vLLM serves (ten minutes)
  python -m finedeep.benchmarks --render                           make the pages anew from saved results"""


def jobs(arguments: argparse.Namespace) -> Iterator[Job]:
    """Everything there is to measure on this device: its group, its case, and what measures it."""
    device, seconds, scratch = arguments.device, arguments.seconds, arguments.output
    for case in cases.CASES[device]:
        yield case.work, case.fields(), lambda case=case: {"seconds": cases.run_case(case, seconds, device)}
    for case in memory.CASES[device]:
        yield "memory", case.fields(), lambda case=case: {"bytes": memory.run_case(case, device)}
    shape = starting.LOADED[device]
    starts: dict[str, Callable[[Path], dict[str, list[float]]]] = {
        "import": lambda folder: starting.imports(seconds),
        f"from_pretrained, {shape}, bfloat16": lambda folder: starting.loading(folder, shape, 7, device),
        f"conversion beside a copy, {shape}, bfloat16": lambda folder: starting.conversion(folder, shape, seconds),
    }
    for name, measure in starts.items():
        yield "start", {"work": name}, lambda measure=measure: {"seconds": in_scratch(measure, scratch)}
    for block in growth.points(device):
        kinds = growth.BLOCKS if block.along == "tokens" else growth.BLOCKS[:3]
        yield (
            "growth",
            block.fields(),
            lambda block=block, kinds=kinds: {"seconds": growth.run_block(block, kinds, min(seconds, 8), device)},
        )


MARKS = {"cpu": "speed", "cpu-quick": "speed-quick", "cuda": "speed-gpu"}
GROUPS = ("prefill", "decode", "train", "memory", "start", "growth")


def in_scratch(measure: Callable[[Path], dict[str, list[float]]], output: Path) -> dict[str, list[float]]:
    """Measure with a folder on the output's disk that is gone afterwards."""
    with tempfile.TemporaryDirectory(dir=output) as folder:
        return measure(Path(folder))


def main() -> None:
    """Measure, save, render."""
    arguments = arguments_of()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    path = results.saved(arguments.output, kind_of(arguments))
    path.parent.mkdir(parents=True, exist_ok=True)
    if arguments.serving:
        path = path.with_name(f"serving-{arguments.device}.json")
        content = serving.load(path) if arguments.render else serving.measure_all(arguments, path)
        print(table := serving.table_of(content))
        if arguments.document:
            put_table(serving.MARK, table, arguments.document)
        return
    if not arguments.render:
        measure_all(arguments, path)
    if arguments.quick:
        return
    for file in results.render(arguments.output):
        print(file)
    if arguments.document:
        for kind, content in results.load(arguments.output).items():
            put_table(MARKS[kind], results.targets_table(content), arguments.document)
        print(arguments.document)


def measure_all(arguments: argparse.Namespace, path: Path) -> None:
    """Run the jobs of the chosen groups; with --resume, those of them that the results do not hold yet."""
    header = described(arguments)
    if arguments.quick:
        rows = []
        for row in quick.rows(arguments.seconds, time.monotonic() + arguments.deadline, arguments.device):
            rows.append(rounded(row) if "seconds" in row else row)
            print(json.dumps(summary(rows[-1])), flush=True)
            save(path, header | {"rows": rows})
        return
    rows = kept_rows(arguments, path, header)
    done = [(row["group"], row["case"]) for row in rows]
    wanted = [job for job in jobs(arguments) if job[0] in arguments.only and (group_of(job[0]), job[1]) not in done]
    if not wanted:
        print(f"{path} holds all of {','.join(arguments.only)} already; without --resume they are measured anew.")
    with tqdm(wanted, unit="case", disable=None) as bar:
        for group, case, measure in bar:
            bar.set_postfix_str(f"{group} {' '.join(str(value) for value in case.values())}"[:60])
            try:
                rows.append({"group": group_of(group), "case": case} | rounded(measure()))
            except torch.OutOfMemoryError as error:
                tqdm.write(f"{group} {case}: left out, it does not fit: {str(error).splitlines()[0]}")
                timing.let_go(arguments.device)
            save(path, header | {"rows": rows})


def kind_of(arguments: argparse.Namespace) -> str:
    """Under which name the results stand: on a GPU the cases in short are all that there are so far."""
    return "cpu-quick" if arguments.quick and arguments.device == "cpu" else arguments.device


def summary(row: dict[str, Any]) -> dict[str, Any]:
    """A row in short: the case, and Finedeep over dense."""
    peaks = row.get("bytes")
    ratio = peaks["finedeep"] / peaks["dense"] if peaks else results.ratio_of(row)[1]
    case = {key: row["case"][key] for key in ("work", "batch", "tokens", "M", "K", "compiled")}
    return {"group": row["group"]} | case | {"finedeep / dense": round(ratio, 3)}


def kept_rows(arguments: argparse.Namespace, path: Path, header: dict[str, Any]) -> list[dict[str, Any]]:
    """What to keep of earlier results: the groups that are not to be measured now, and with --resume all of it."""
    if not path.exists():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    keeps = [row for row in content["rows"] if arguments.resume or chosen_group(row) not in arguments.only]
    for what in ("machine", "versions"):
        if keeps and content[what] != header[what]:
            raise SystemExit(
                f"{path} was measured with {content[what]}, and here is {header[what]}: figures of both would be "
                "mixed. Measure all groups without --resume, or choose another --output."
            )
    return keeps


def chosen_group(row: dict[str, Any]) -> str:
    """The group by which --only knows a row."""
    return row["case"]["work"] if row["group"] == "model" else row["group"]


def group_of(job: str) -> str:
    """The group under which results stand: whole models are one."""
    return "model" if job in cases.WORKS else job


def rounded(measured: Any) -> Any:
    """Times to four significant digits, which is more than there are."""
    if isinstance(measured, dict):
        return {name: rounded(value) for name, value in measured.items()}
    if isinstance(measured, list):
        return [float(f"{value:.4g}") for value in measured]
    return measured


def save(path: Path, content: dict[str, Any]) -> None:
    """Write, then move into place, so that a stop in between loses one case at most. One row of results a line."""
    rows = ",\n".join(json.dumps(row) for row in content["rows"])
    head = json.dumps({key: value for key, value in content.items() if key != "rows"}, indent=1)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(f'{head[:-2]},\n "rows": [\n{rows}\n]}}\n', encoding="utf-8")
    unfinished.replace(path)


def described(arguments: argparse.Namespace) -> dict[str, Any]:
    """Where, with what, and that the contenders do the same work."""
    device = arguments.device
    options = f" --device {device} --seconds {arguments.seconds:g}"
    options += f" --threads {arguments.threads}" if arguments.threads else ""
    options += f" --quick --deadline {arguments.deadline:g}" if arguments.quick else ""
    shapes = (quick.SHAPE[device],) if arguments.quick else SHAPES
    return {
        "command": "python -m finedeep.benchmarks" + options,
        "machine": {
            "kind": kind_of(arguments),
            "device": processor() if device == "cpu" else torch.cuda.get_device_name(),
            "threads": torch.get_num_threads(),
        },
        "versions": {
            "finedeep": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "parameters": {name: parameters_of(name, 2, 8) for name in shapes},
        "difference": {dtype: largest_difference(SHAPES["31M"], 2, 8, dtype, device) for dtype in DTYPES},
    }


def arguments_of() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m finedeep.benchmarks",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=sorted(cases.CASES), default=here, help=f"default: {here}, found here")
    parser.add_argument("--only", type=chosen_groups, default=GROUPS, help=f"some of {','.join(GROUPS)}; default: all")
    parser.add_argument("--seconds", type=float, default=15, help="to spend on a case, after warming up; default: 15")
    parser.add_argument("--threads", type=int, help="of the CPU; default: what torch takes")
    parser.add_argument("--output", type=Path, default=Path("finedeep-benchmarks"), help="default: %(default)s")
    parser.add_argument("--resume", action="store_true", help="measure only what OUTPUT does not hold yet")
    parser.add_argument("--quick", action="store_true", help="only the cases that say most; nothing is rendered")
    parser.add_argument("--deadline", type=float, default=480, help="of --quick, in seconds; default: %(default)s")
    parser.add_argument("--serving", action="store_true", help="only vLLM, dense beside M = 1 and M = 2; needs vLLM")
    parser.add_argument("--rounds", type=int, default=9, help="of --serving; default: %(default)s")
    parser.add_argument("--render", action="store_true", help="measure nothing")
    parser.add_argument("--document", type=Path, help="the document that gets the tables")
    arguments = parser.parse_args()
    if arguments.quick and (arguments.resume or arguments.render or arguments.document or arguments.only != GROUPS):
        parser.error(
            "--quick measures its own few cases, from the start, and renders nothing: give no other option of "
            "what to measure or to render"
        )
    if arguments.device == "cuda" and here == "cpu" and not arguments.render:
        parser.error("--device cuda: torch finds no GPU here")
    if not (arguments.quick or arguments.serving) and importlib.util.find_spec("matplotlib") is None:
        parser.error("the plots need matplotlib: pip install 'finedeep[plots]'")
    if arguments.document:
        speeds = {MARKS[kind] for kind in results.load(arguments.output).keys() | {kind_of(arguments)}}
        for mark in {serving.MARK} if arguments.serving else speeds:
            check_marks(mark, arguments.document)
    return arguments


def chosen_groups(text: str) -> tuple[str, ...]:
    """The groups of a comma-separated list."""
    groups = tuple(text.split(","))
    if unknown := set(groups) - set(GROUPS):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: not a group; choose from {','.join(GROUPS)}")
    return groups


if __name__ == "__main__":
    main()
