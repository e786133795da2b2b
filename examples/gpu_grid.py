"""Run a ranked list of trainings, several at a time on one GPU, for as long as there is time.

    python3 examples/gpu_grid.py examples/gpu_grid.yaml OUT.jsonl --train BOOKS.txt.xz --author OTHER.txt --deadline 600

Nothing has to be installed but torch, transformers, numpy, tokenizers, pyyaml and tqdm. The text is tokenised once,
while the first runs start. Each run is examples/plain.py in a process of its own; while one compiles, others train.
OUT.jsonl has a line a run: recipe, losses on a fixed schedule, and at its end NSAR (the non-sparse activation rate) and
gates. It is written anew every few seconds, so that whatever happens the curves so far are there; `finished` says which
runs are whole. Before the deadline all are stopped with their states saved: the same command then continues. On a CPU:
--only '4m/*' --processes 2. examples/results.py takes such files, of several machines too, from examples/logs/gpu.
"""

import argparse
import fnmatch
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipe import Changes, Recipe, read_recipe, runs_of, without_folders

HERE = Path(__file__).parent
GRACE = 15.0  # seconds before the deadline in which runs save their states
LOOK = 0.5  # seconds between two looks at the runs
WRITE = 5.0  # seconds between two writings of OUT.jsonl
SAY = 20.0  # seconds between two lines on the screen
POINTS = 10  # times that a run is measured where --tokens says how long it is


@dataclass
class Run:
    """A training: its name, its recipe, the folder that it writes to, its process, and what went wrong."""

    name: str
    recipe: Recipe
    words: list[str]
    folder: Path
    process: subprocess.Popen | None = None
    failure: str | None = None
    kept: dict[str, Any] = field(default_factory=dict)  # what an earlier OUT.jsonl has of it

    def line(self) -> dict[str, Any]:
        """What is known of it; nothing before its log begins."""
        log = self.folder / "log.jsonl"
        if self.kept.get("finished") or not log.exists():
            return self.kept
        # a line that is being written has no end yet
        first, *rest = map(json.loads, log.read_text(encoding="utf-8").rpartition("\n")[0].splitlines())
        points = [line for line in rest if "step" in line]
        last = [line for line in rest if "step" not in line]
        found = {"name": self.name, "finished": bool(points) and points[-1]["step"] == steps_of(self.recipe)}
        found |= first | {"log": points} | (last[0] if last else {})
        return found | ({"failure": self.failure} if self.failure else {})

    def says(self) -> str:
        """Its name and where it is."""
        points = self.line().get("log")
        last = points[-1] if points else {"step": 0}
        losses = " ".join(f"{last[name]:.3f}" for name in last if name.startswith("eval_"))
        return f"{self.name} {last['step']}/{steps_of(self.recipe)} {losses}".rstrip()


def main() -> None:
    """Choose the runs, prepare the text, run until the deadline."""
    begun = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path, help="a YAML file, such as examples/gpu_grid.yaml")
    parser.add_argument("out", type=Path, help="a file to write, such as h100.jsonl")
    parser.add_argument("--train", type=Path, help="the text to train on; some of it is held out")
    parser.add_argument("--author", type=Path, help="a text by somebody else, to measure on too")
    parser.add_argument(
        "--measure", action="append", default=[], metavar="NAME=FILE", help="one more text to measure on"
    )
    parser.add_argument(
        "--starts", type=Path, help="a folder that examples/starts.py has made, for a grid that needs it"
    )
    parser.add_argument("--data", type=Path, help="instead of texts: a folder that examples/prepare.py has made")
    parser.add_argument("--work", type=Path, help="a folder for tokens and states (default: .OUT.work beside OUT)")
    parser.add_argument("--deadline", type=float, default=math.inf, metavar="SECONDS", help="from now (default: none)")
    parser.add_argument("--processes", type=int, default=5, help="how many train at a time (default: %(default)s)")
    parser.add_argument("--tokens", type=float, help="for each run (default: as the recipe says)")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="names to choose, with wildcards")
    parser.add_argument("--list", action="store_true", help="only say what there is to run")
    arguments = parser.parse_args()
    if not arguments.data and not (arguments.train and arguments.author):
        parser.error("name the texts (--train and --author), or tokens that are made of them (--data).")
    runs = chosen(arguments)
    if not runs:
        parser.error(f"no run of {arguments.grid} has a name like {arguments.only!r}; names are SIZE/MODEL/RATE-SEED.")
    others = keep(runs, arguments.out)
    if arguments.list:
        print("\n".join(run.name for run in runs if not run.line().get("finished")))
        return
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    grid = Grid(runs, arguments.out, arguments.processes, begun, begun + arguments.deadline, others)
    if not arguments.data:
        grid.prepare()
    grid.work()
    print(table_of(runs), flush=True)
    if failed := [run for run in runs if run.failure]:
        raise SystemExit("\n".join(f"{run.name} failed: {run.failure}" for run in failed))


def chosen(arguments: argparse.Namespace) -> list[Run]:
    """The runs that were asked for, in the grid's order."""
    grid = read_recipe(arguments.grid)
    path = arguments.grid.parent / grid["recipe"]
    work = arguments.work or arguments.out.with_name(f".{arguments.out.stem}.work")
    runs = []
    for name, changes in runs_of(grid):
        if fnmatch.fnmatch(name, arguments.only):
            data = arguments.data or work / "data" / name.partition("/")[0]
            changes = changes | {"data.prepared": str(data.absolute())}
            if not arguments.data:
                changes |= {"data.train": str(arguments.train.absolute())}
                texts = {"author": arguments.author} | dict(text.split("=", 1) for text in arguments.measure)
                changes |= {"data.validation": {name: str(Path(file).absolute()) for name, file in texts.items()}}
            if "start" in changes:
                start = str((starts_of(arguments) / changes["start"]).absolute())
                changes |= {"start": start, "tokenizer.path": start}
            if arguments.tokens:
                changes |= length_of(read_recipe(path, words_of(changes)), arguments.tokens)
            words = words_of(changes)
            runs.append(Run(name, read_recipe(path, words), [str(path), *words_for(words)], work / "runs" / name))
    return runs


def starts_of(arguments: argparse.Namespace) -> Path:
    """Where the models lie from which the grid's runs start. Exits where that was not said."""
    if not arguments.starts:
        raise SystemExit(f"{arguments.grid} continues from checkpoints: name their folder, --starts.")
    return arguments.starts


def words_of(changes: Changes) -> list[str]:
    """Changes as `A.B=VALUE`."""
    return [f"{name}={json.dumps(value)}" for name, value in changes.items()]


def words_for(changes: Sequence[str]) -> list[str]:
    """Changes as words of a command line."""
    return [f"--set={change}" for change in changes]


def length_of(recipe: Recipe, tokens: float) -> Changes:
    """The fields that make a run as long as so many tokens."""
    steps = int(tokens) // (recipe["training"]["per_device_train_batch_size"] * recipe["data"]["context"])
    return {"training.max_steps": steps, "training.eval_steps": max(1, steps // POINTS)}


def steps_of(recipe: Recipe) -> int:
    """How many there are."""
    return recipe["training"]["max_steps"]


def keep(runs: Sequence[Run], out: Path) -> list[dict[str, Any]]:
    """Give each run what OUT.jsonl has of it. Returns what it has of others. Exits where a recipe is another."""
    if not out.exists():
        return []
    lines = {line["name"]: line for line in map(json.loads, out.read_text(encoding="utf-8").splitlines())}
    for run in runs:
        run.kept = lines.pop(run.name, {})
        if run.kept and run.kept["recipe"] != json.loads(json.dumps(without_folders(run.recipe))):
            raise SystemExit(f"{out} has {run.name} of another recipe: name another file.")
    return list(lines.values())


class Grid:
    """The runs at work."""

    def __init__(
        self,
        runs: list[Run],
        out: Path,
        processes: int,
        begun: float,
        deadline: float,
        others: Sequence[dict[str, Any]] = (),
    ):
        self.others = others  # lines of runs that --only did not choose
        self.runs, self.out, self.processes, self.begun, self.deadline = runs, out, processes, begun, deadline
        self.stopped = False
        self.preparing: dict[Path, subprocess.Popen] = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.stop)
        share = str(max(1, cores() // processes))
        self.environment = {**os.environ, "OMP_NUM_THREADS": share, "TORCHINDUCTOR_COMPILE_THREADS": share}

    def stop(self, *_: Any) -> None:
        """As at the deadline."""
        self.stopped = True

    def prepare(self) -> None:
        """Begin to tokenise, for each size, as they may have tokenizers of their own. Runs wait for it."""
        for run in self.runs:
            folder = Path(run.recipe["data"]["prepared"])
            if folder not in self.preparing:
                folder.mkdir(parents=True, exist_ok=True)
                path, *words = run.words
                command = [sys.executable, str(HERE / "prepare.py"), path, str(folder), *words]
                self.preparing[folder] = self.started(command, folder, dict(os.environ))

    def started(self, command: list[str], folder: Path, environment: dict[str, str]) -> subprocess.Popen:
        """A process; what it says goes to a file. A Ctrl-C is for this process, which stops the others in order."""
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "said.txt").open("w", encoding="utf-8") as said:
            return subprocess.Popen(command, stdout=said, stderr=said, env=environment, start_new_session=True)

    def work(self) -> None:
        """Run what is not finished, until it is or there is no more time."""
        left = [run for run in self.runs if not run.line().get("finished")]
        running: list[Run] = []
        grace = min(GRACE, (self.deadline - self.begun) / 4)
        written = said = 0.0
        while (left or running) and not self.stopped and (now := time.monotonic()) < self.deadline - grace:
            while left and len(running) < self.processes:
                running.append(run := left.pop(0))
                command = [sys.executable, str(HERE / "plain.py"), run.words[0], str(run.folder), "--wait"]
                run.process = self.started([*command, *run.words[1:]], run.folder, self.environment)
            for run in [run for run in running if run.process.poll() is not None]:
                running.remove(run)
                self.reap(run)
            for folder, process in self.preparing.items():
                if process.poll():
                    self.end(running, 0)
                    raise SystemExit(f"The texts could not be prepared: {end_of(folder)}")
            if now - written > WRITE:
                self.write()
                written = now
            if now - said > SAY:
                print(f"{now - self.begun:.0f} s: {'; '.join(run.says() for run in running)}", flush=True)
                said = now
            time.sleep(LOOK)
        self.end(running, grace)
        self.write()

    def reap(self, run: Run) -> None:
        """Note how a process has ended."""
        if run.process.returncode:
            code = run.process.returncode
            run.failure = end_of(run.folder) if code > 0 else f"ended by signal {-code}"
        print(f"{time.monotonic() - self.begun:.0f} s: {run.says()} {'FAILED' if run.failure else 'done'}", flush=True)

    def end(self, running: Sequence[Run], seconds: float) -> None:
        """Let processes save their states, for some seconds, then end those that have not."""
        processes = [run.process for run in running] + list(self.preparing.values())
        for process in processes:
            process.terminate()
        until = time.monotonic() + seconds
        for process in processes:
            try:
                process.wait(max(0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()

    def write(self) -> None:
        """What there is of each run, whole or not at all."""
        lines = [json.dumps(line) for line in (*self.others, *(run.line() for run in self.runs)) if line]
        scratch = self.out.with_name(f".{self.out.name}.new")
        scratch.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        scratch.replace(self.out)


def cores() -> int:
    """How many this process may use: of a shared machine's, some."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_of(folder: Path) -> str:
    """The last lines that a process has said."""
    return (folder / "said.txt").read_text(encoding="utf-8", errors="replace").strip()[-1500:]


def table_of(runs: Sequence[Run]) -> str:
    """What came out, a line a run."""
    rows = []
    for run in runs:
        if points := run.line().get("log"):
            line = run.line()
            figures = [f"{name} {line[name]:.3f}" for name in ("gate_mean", "gate_std", "gate_low") if name in line]
            nsar = [f"NSAR {line['nsar']['0.1']:.3f}"] if "nsar" in line else []
            speed = f"{points[-1]['tokens'] / max(points[-1]['seconds'], 1e-9):,.0f} tokens/s"
            rows.append(", ".join([run.says(), *nsar, *figures, speed]))
    return "\n".join(rows)


if __name__ == "__main__":
    main()
