"""Train a dense Llama or a Finedeep model from random weights, everything else equal.

    python examples/pretrain.py RECIPE.yaml OUT --set model=llama --set training.seed=1
    accelerate launch --config_file examples/launch/fsdp2.yaml examples/pretrain.py RECIPE.yaml OUT
    torchrun --nproc_per_node 8 examples/pretrain.py RECIPE.yaml OUT

The recipe says what is trained on what (examples/recipes); --set changes a field of it. The text is tokenised once,
into OUT/tokens (examples/prepare.py), and its documents are packed into sequences, in the same order for every model
of one data.seed. Losses and speed go to OUT/log.jsonl and checkpoints to OUT/checkpoint-N: the same command again goes
on from the last one, with the losses that an unbroken run would have had. The trained model is in OUT/model;
a finished run is left as it is.
"""

import argparse
import re
import time
from pathlib import Path
from typing import Any

import from_checkout  # noqa: F401
import torch
from finedeep.convert.heal.training_checkpoints import ArgumentsWithoutSecrets, train_to_the_end
from optimisation import groups_of
from packed import texts_to_train_and_measure_on
from prepare import prepare
from recipe import Recipe, changed, read_recipe, training_of
from run_log import add_to_log, begin_log, first_line, speed
from starting_model import model_of
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

__all__ = ["changed", "model_of", "pretrain"]

LOGGED = re.compile("loss|eval_(.+_)?loss|grad_norm|learning_rate")
DONE = "finished"  # an empty file that is made last


def main() -> None:
    """Read the recipe, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="a YAML file, such as examples/recipes/books-4m.yaml")
    parser.add_argument("out", type=Path, help="a folder for tokens, checkpoints, losses and the model")
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="A.B=VALUE", help="as in YAML")
    arguments = parser.parse_args()
    pretrain(read_recipe(arguments.recipe, arguments.changes), arguments.out)


def pretrain(recipe: Recipe, out: Path) -> None:
    """Train as the recipe says, unless that is done. Losses are in nats per token."""
    if (out / DONE).exists():
        print(f"{out / 'model'} is finished: there is nothing left to train. Remove {out} to train anew.")
        return
    if recipe.get("ideas"):
        raise SystemExit("No checkpoint can carry the code of `ideas`: train such a recipe by examples/plain.py.")
    gpu = torch.accelerator.is_available()
    arguments = ArgumentsWithoutSecrets(
        output_dir=str(out),
        eval_strategy="steps",
        report_to="none",
        save_total_limit=1,
        use_cpu=not gpu,
        **training_of(recipe, gpu),
    )
    prepared = Path(recipe["data"].get("prepared") or out)
    with arguments.main_process_first(local=False, desc="preparing"):
        tokenizer = prepare(recipe, prepared)
    text, measured = texts_to_train_and_measure_on(recipe["data"], prepared)
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    model = model_of(recipe, tokenizer)
    trainer = OrderedTrainer(
        recipe["rates"],
        model=model,
        args=arguments,
        train_dataset=text.of_length(arguments.max_steps * batch),
        eval_dataset=measured.pop("validation") if measured.keys() == {"validation"} else measured,
        callbacks=[Log(out / "log.jsonl", recipe, model, batch * recipe["data"]["context"])],
    )
    train_to_the_end(trainer, out)
    if trainer.state.global_step % arguments.eval_steps:
        trainer.evaluate()
    trainer.save_model(out / "model")
    tokenizer.save_pretrained(out / "model")
    if trainer.is_world_process_zero():
        (out / DONE).touch()


class OrderedTrainer(Trainer):
    """A Trainer that takes sequences in their order, with weight decay on matrices only and several learning rates."""

    def __init__(self, rates: dict[str, float], **arguments: Any):
        super().__init__(**arguments)
        self.rates = rates

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def create_optimizer(self, *model: PreTrainedModel | None) -> torch.optim.Optimizer:
        """The recipe's, with groups of our own. The model is an argument in some versions, and may be another one."""
        if self.optimizer is None:
            trained = next(filter(None, model), self.model)
            optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            groups = groups_of(trained, self.args.weight_decay, self.args.learning_rate, self.rates)
            self.optimizer = optimizer(groups, **options)
        return self.optimizer


class Log(TrainerCallback):
    """What is trained, then losses and speed; after a kill what the last checkpoint does not know is cut."""

    def __init__(self, path: Path, recipe: Recipe, model: PreTrainedModel, tokens_a_step: int):
        self.path, self.tokens_a_step = path, tokens_a_step
        self.first = first_line(recipe, model)
        self.begin = 0.0
        self.mark: tuple[int, float] | None = None  # a step, and when training continued after it

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.begin = time.perf_counter()
        if state.is_world_process_zero:
            begin_log(self.path, self.first, state.global_step)
            print(f"{self.first['parameters']:,} parameters, {self.first['flops_per_token']:,.0f} FLOPs per token")

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if self.mark is None:  # the first step compiles
            self.go_on(state)

    def on_evaluate(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.go_on(state)

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.go_on(state)

    def go_on(self, state: Any) -> None:
        """Measure speed from here on."""
        self.mark = state.global_step, time.perf_counter()

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        kept = {name: value for name, value in (logs or {}).items() if LOGGED.fullmatch(name)}
        if not state.is_world_process_zero or not any(name.endswith("loss") for name in kept):
            return
        line = {
            "step": state.global_step,
            "tokens": state.global_step * self.tokens_a_step,
            "seconds": round(time.perf_counter() - self.begin, 1),
            **kept,
        }
        if "loss" in kept and self.mark and (steps := state.global_step - self.mark[0]):
            passed = time.perf_counter() - self.mark[1]
            line |= speed(steps * self.tokens_a_step, passed, self.first["flops_per_token"], args.world_size)
            self.go_on(state)
        add_to_log(self.path, line)


if __name__ == "__main__":
    main()
