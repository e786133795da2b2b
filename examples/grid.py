"""Train many models on the same text, some at a time, and keep their logs.

    python examples/mix.py BOOKS.txt.xz MIXED.txt --held-out HELD_OUT.txt
    python examples/grid.py examples/grid.yaml OUT --train MIXED.txt --held-out HELD_OUT.txt --author OTHER.txt

The grid says which models, of which sizes, with which learning rates and seeds. Each is trained by examples/pretrain.py
in a process of its own, on one thread, and looked into as `finedeep inspect` does. Its log, SIZE/MODEL/RATE-SEED.jsonl,
goes to examples/logs when it is whole; one that is there is not made again, so the same command continues after a kill.
--only chooses by name, `--only '1m/dense/*'`. examples/results.py makes examples/RESULTS.md of the logs.
"""

import argparse
import fnmatch
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Lock
from typing import Any

import from_checkout  # noqa: F401
import yaml
from finedeep.eval.inspect.inspection import inspect
from finedeep_files.whole_file import write_whole
from recipe import Changes, runs_of
from tqdm import tqdm

HERE = Path(__file__).parent
INSPECTED = 16_384  # tokens of the held-out text


def main() -> None:
    """Train what the grid asks for and is not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path, help="a YAML file, such as examples/grid.yaml")
    parser.add_argument("out", type=Path, help="a folder for checkpoints and models")
    parser.add_argument("--train", type=Path, required=True, help="the text to train on, as examples/mix.py makes it")
    parser.add_argument("--held-out", type=Path, required=True, help="what mix.py held out, to measure on")
    parser.add_argument("--author", type=Path, required=True, help="a text by somebody else, to measure on too")
    parser.add_argument("--logs", type=Path, default=HERE / "logs", help="a folder for logs (default: %(default)s)")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="names to choose, with wildcards")
    parser.add_argument("--processes", type=int, default=1, help="how many to train at a time (default: 1)")
    parser.add_argument("--list", action="store_true", help="only say what there is to train")
    arguments = parser.parse_args()
    grid = yaml.safe_load(arguments.grid.read_text(encoding="utf-8"))
    wanted = [(name, changes) for name, changes in runs_of(grid) if fnmatch.fnmatch(name, arguments.only)]
    if not wanted:
        parser.error(f"no run of {arguments.grid} has a name like {arguments.only!r}; names are SIZE/MODEL/RATE-SEED.")
    missing = [(name, changes) for name, changes in wanted if not (arguments.logs / f"{name}.jsonl").exists()]
    if arguments.list:
        print("\n".join(name for name, _ in missing))
        return
    measured = {"held_out": str(arguments.held_out.resolve()), "author": str(arguments.author.resolve())}
    texts = {"data.train": str(arguments.train.resolve()), "data.validation": measured}
    texts["data.prepared"] = str((arguments.out / "prepared").resolve())  # of the first run, for all
    recipe = arguments.grid.parent / grid["recipe"]
    one_at_a_time = Lock()  # transformers does not load models in several threads at once

    def train(run: tuple[str, Changes]) -> None:
        name, changes = run
        log = arguments.logs / f"{name}.jsonl"
        pretrain(recipe, arguments.out / name, texts | changes)
        with one_at_a_time:
            found = inspect(arguments.out / name / "model", arguments.held_out, tokens=INSPECTED, progress=False)
        lines = (arguments.out / name / "log.jsonl").read_text(encoding="utf-8")
        log.parent.mkdir(parents=True, exist_ok=True)
        write_whole(log, lines + json.dumps(kept_of(found)) + "\n")
        bar.set_postfix_str(name)
        bar.update()

    with tqdm(total=len(missing), unit="run") as bar, ThreadPoolExecutor(arguments.processes) as pool:
        try:
            for done in as_completed([pool.submit(train, run) for run in missing]):
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # those not begun; what others have trained so far is kept
            raise


def pretrain(recipe: Path, out: Path, changes: Changes) -> None:
    """Train in a process of its own. Raises RuntimeError with the end of what it said."""
    words = [str(recipe), str(out), *(f"--set={name}={json.dumps(value)}" for name, value in changes.items())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(HERE / "pretrain.py"), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{out}: {done.stderr[-3000:]}")


def kept_of(found: dict[str, Any]) -> dict[str, Any]:
    """Of what `inspect` returns what a small log holds: NSAR and histogram, and by sub-layer what the gates do."""
    gates = [place["gates"] for place in found["places"] if "gates" in place]
    names = ("mean", "std", "never_matters")
    rounded = [{name: rounded_of(gate[name]) for name in names} for gate in gates]
    return {"inspected_tokens": found["predicted_tokens"], "nsar": found["nsar"], "histogram": found["histogram"]} | (
        {"gates": rounded} if gates else {}
    )


def rounded_of(value: Any) -> Any:
    """Numbers with four decimals, in lists too."""
    return [round(x, 4) for x in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
