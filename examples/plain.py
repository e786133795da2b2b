"""Train as examples/pretrain.py does, by a plain loop in one process, then look into the model's FFNs.

    python examples/plain.py RECIPE.yaml OUT --set training.seed=1

Same recipe, same tokens, same log, OUT/log.jsonl; of the recipe's training it takes the fields in `Training`. The log's
last line has NSAR (the non-sparse activation rate) and gates on the held-out text; from a checkpoint (the recipe's
start) its first does too. A SIGTERM stops it with its state saved, and the same command then continues. The model is
not saved. examples/gpu_grid.py runs many of these on one GPU.
"""

import argparse
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import from_checkout  # noqa: F401
import torch
from finedeep.eval.inspect.inspection import summary_of
from finedeep.eval.inspect.recorder import places_of, watch
from optimisation import groups_of
from packed import Packed, texts_to_train_and_measure_on
from recipe import Recipe, read_recipe, training_of
from run_log import add_to_log, begin_log, first_line, speed
from starting_model import model_of
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, get_scheduler

LOW = 0.5  # a gate below it halves its expert, if 1 is neutral
INSPECTED = 16_384  # tokens
WAIT = 0.2  # seconds between two looks for a file


@dataclass
class Training:
    """The fields of a recipe's training that a plain loop knows, as TrainingArguments has them."""

    max_steps: int
    per_device_train_batch_size: int
    learning_rate: float
    eval_steps: int
    lr_scheduler_type: str = "linear"
    warmup_steps: int = 0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    bf16: bool = False
    tf32: bool = False
    torch_compile: bool = False

    @classmethod
    def of(cls, recipe: Recipe) -> "Training":
        """From a recipe, on this machine."""
        given = training_of(recipe, torch.accelerator.is_available())
        return cls(**{field.name: given[field.name] for field in fields(cls) if field.name in given})


def main() -> None:
    """Read the recipe, train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="a YAML file, such as examples/recipes/books-4m.yaml")
    parser.add_argument("out", type=Path, help="a folder for the log")
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="A.B=VALUE", help="as in YAML")
    parser.add_argument("--wait", action="store_true", help="for data.prepared, which another process makes")
    arguments = parser.parse_args()
    recipe = read_recipe(arguments.recipe, arguments.changes)
    arguments.out.mkdir(parents=True, exist_ok=True)
    prepared = Path(recipe["data"].get("prepared") or arguments.out)
    if not arguments.wait:
        from prepare import prepare

        prepare(recipe, prepared)
    train(recipe, prepared, arguments.out)


def wait_for(path: Path) -> Path:
    """Until it is there, or whoever started this process is not."""
    parent = os.getppid()
    while not path.exists():
        if os.getppid() != parent:
            raise SystemExit(f"{path} will not be made any more.")
        time.sleep(WAIT)
    return path


def train(recipe: Recipe, prepared: Path, out: Path) -> None:
    """Train as the recipe says, from the saved state where there is one."""
    with Stop() as stop:
        train_until(stop, recipe, prepared, out)


def train_until(stop: "Stop", recipe: Recipe, prepared: Path, out: Path) -> None:
    """`train`, unless it is asked to stop before."""
    training = Training.of(recipe)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    torch.set_float32_matmul_precision("high" if training.tf32 else "highest")
    tokenizer = AutoTokenizer.from_pretrained(wait_for(prepared / "tokenizer"))
    model = model_of(recipe, tokenizer)
    first = first_line(recipe, model)
    model.to(device).train()
    losses = Losses(model, device, training)
    shape = (training.per_device_train_batch_size, recipe["data"]["context"])
    losses(torch.zeros(shape, dtype=torch.long)).backward()  # compiles, and is not in the times
    optimizer = torch.optim.AdamW(
        groups_of(model, training.weight_decay, training.learning_rate, recipe["rates"]),
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        fused=device.type == "cuda",
    )
    optimizer.zero_grad()
    schedule = get_scheduler(training.lr_scheduler_type, optimizer, training.warmup_steps, training.max_steps)
    wait_for(prepared / "tokens")
    text, measured = texts_to_train_and_measure_on(recipe["data"], prepared)
    state = State(out / "state.pt", model, optimizer, schedule)
    step, total, trained = state.load()
    log = out / "log.jsonl"
    begin_log(log, first, step)
    if recipe.get("start") and not step:
        found = looked_into(model, next(iter(measured.values())), losses)
        before = {name: figure for name, figure in found.items() if name not in ("histogram", "gates")}
        add_to_log(log, {"step": 0, "tokens": 0, "seconds": 0.0} | losses.of(measured) | before)
        model.train()
    begin = mark = time.perf_counter()
    since = step
    while step < training.max_steps and not stop.asked:
        loss = losses(text.batch(range(step * shape[0], (step + 1) * shape[0])))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        total, trained, step = total + loss.detach(), trained + 1, step + 1
        if step % training.eval_steps == 0 or step == training.max_steps:
            line = {"step": step, "tokens": step * shape[0] * shape[1], "loss": float(total) / trained}
            line |= speed((step - since) * shape[0] * shape[1], time.perf_counter() - mark, first["flops_per_token"])
            add_to_log(log, line | losses.of(measured) | {"seconds": round(time.perf_counter() - begin, 1)})
            total, trained, since, mark = 0.0, 0, step, time.perf_counter()
    if step < training.max_steps:
        state.save(step, total, trained)
        raise SystemExit(f"Stopped after {step} of {training.max_steps} steps; the same command continues.")
    add_to_log(log, looked_into(model, next(iter(measured.values())), losses))
    state.path.unlink(missing_ok=True)


class Stop:
    """Whether this process was asked to stop, or whoever started it is gone."""

    def __init__(self) -> None:
        self.signalled, self.parent = False, os.getppid()

    def __enter__(self) -> "Stop":
        self.before = signal.signal(signal.SIGTERM, self.signal)
        return self

    def __exit__(self, *_: Any) -> None:
        # Whoever inherited this one, as a pool's processes do, would never end at a SIGTERM.
        signal.signal(signal.SIGTERM, self.before)

    def signal(self, *_: Any) -> None:
        self.signalled = True

    @property
    def asked(self) -> bool:
        return self.signalled or os.getppid() != self.parent


class Losses:
    """A model's loss on windows, compiled where the training says so: layer by layer, which is soon done."""

    def __init__(self, model: PreTrainedModel, device: torch.device, training: Training):
        self.model, self.device, self.batch = model, device, training.per_device_train_batch_size
        self.compiled = training.torch_compile
        self.autocast = torch.autocast(device.type, torch.bfloat16) if training.bf16 else nullcontext()
        self.head: Callable[..., torch.Tensor] = head_loss
        if self.compiled:
            torch._dynamo.config.suppress_errors = True  # slow is better than nothing
            self.head = torch.compile(head_loss)
            for layer in model.model.layers:
                layer.compile()

    def __call__(self, ids: torch.Tensor, rows: int | None = None) -> torch.Tensor:
        """Mean loss of next tokens, in nats. Args: ids (batch, seq) on any device; of which only `rows` count."""
        if self.device.type == "cuda":
            ids = ids.pin_memory()
        ids = ids.to(self.device, non_blocking=True)
        with self.autocast:
            hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
            targets = ids.roll(-1, 1)
            targets[:, -1] = -100
            if rows is not None:
                targets[rows:] = -100
            return self.head(self.model.lm_head, hidden, targets)

    def of(self, measured: dict[str, Packed]) -> dict[str, float]:
        """By the names that a log has for them, the losses of all that is measured on."""
        return {f"eval_{name}_loss": self.mean(windows) for name, windows in measured.items()}

    def mean(self, windows: Packed) -> float:
        """Over all windows. By the graph that trains, where there is one, so that no other must be compiled."""
        total = 0.0
        with torch.set_grad_enabled(self.compiled):
            for ids, rows in self.batches(windows):
                total += self(ids, rows).detach() * rows
        return float(total) / len(windows)

    def batches(self, windows: Packed) -> Iterator[tuple[torch.Tensor, int]]:
        """Of one size: the last is filled up with repetitions; how many rows of it count."""
        for begin in range(0, len(windows), self.batch):
            some = range(begin, min(begin + self.batch, len(windows)))
            yield windows.batch([*some, *[begin] * (self.batch - len(some))]), len(some)


def head_loss(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Args: hidden (batch, seq, d); targets (batch, seq), -100 where none. Returns the mean cross-entropy."""
    logits = head(hidden).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class State:
    """What a stopped training is resumed from."""

    def __init__(self, path: Path, *parts: Any):
        self.path, self.parts = path, parts

    def save(self, step: int, total: torch.Tensor | float, trained: int) -> None:
        """Whole or not at all."""
        scratch = self.path.with_suffix(".new")
        torch.save(([part.state_dict() for part in self.parts], step, float(total), trained), scratch)
        scratch.replace(self.path)

    def load(self) -> tuple[int, float, int]:
        """How many steps were trained, and the sum and number of losses since the last line of the log."""
        if not self.path.exists():
            return 0, 0.0, 0
        states, *rest = torch.load(self.path, map_location="cpu", weights_only=True)
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)
        return tuple(rest)


@torch.no_grad()
def looked_into(model: PreTrainedModel, windows: Packed, losses: Losses) -> dict[str, Any]:
    """NSAR and histogram of act(gate), and what the gates do, on INSPECTED tokens."""
    model.eval()
    places = places_of(model)
    number = min(len(windows), max(1, INSPECTED // windows.context))
    gates = []
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(losses.autocast)
        for handle in [handle for place in places for handle in watch(*place)]:
            stack.callback(handle.remove)
        for i in range(number):
            more = {"output_router_logits": True} if places[0][0].K else {}
            out = model.model(input_ids=windows.batch([i]).to(model.device), use_cache=False, **more)
            gates += [g.float() for g in out.get("router_logits") or ()]
    found = summary_of([place for place, _ in places])
    line = {"inspected_tokens": number * windows.context, "nsar": found["nsar"], "histogram": found["histogram"]}
    if gates:
        g = torch.stack(gates)
        line |= {"gate_mean": float(g.mean()), "gate_std": float(g.std()), "gate_low": float((g < LOW).float().mean())}
        line["gates"] = [
            {name: [round(x, 4) for x in place["gates"][name]] for name in ("mean", "std")} for place in found["places"]
        ]
    return line


if __name__ == "__main__":
    main()
