"""Train a dense Llama or a Finedeep model from random weights, everything else equal.

    python examples/pretrain.py RECIPE.yaml OUT --set model=llama --set training.seed=1
    accelerate launch --config_file examples/launch/fsdp2.yaml examples/pretrain.py RECIPE.yaml OUT
    torchrun --nproc_per_node 8 examples/pretrain.py RECIPE.yaml OUT

The recipe says what is trained on what (examples/recipes); --set changes a field of it. The text streams from the disk
and is packed into sequences, in the same order for every model of one data.seed. Losses go to OUT/log.jsonl and
checkpoints to OUT/checkpoint-N: the same command again goes on from the last one, with the losses that an unbroken run
would have had. The trained model is in OUT/model.
"""

import argparse
import glob
import json
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from datasets import IterableDataset, load_dataset
from finedeep import FinedeepConfig, FinedeepForCausalLM, __version__
from finedeep.convert.masking import masked
from finedeep.convert.training_checkpoints import whole_checkpoints
from finedeep.demo.dense import train_tokenizer
from finedeep.eval.cost import flops
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

KINDS = {"llama": (LlamaConfig, LlamaForCausalLM), "finedeep": (FinedeepConfig, FinedeepForCausalLM)}
LINES = 1000  # of the text that are tokenised and packed at a time
FOR_TOKENIZER = 40  # times as many lines
LOGGED = re.compile("loss|eval_(.+_)?loss|grad_norm|learning_rate")
SHUFFLED = 2000  # sequences among which the next one is drawn
Recipe = dict[str, Any]


def main() -> None:
    """Read the recipe, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="a YAML file, such as examples/recipes/books-4m.yaml")
    parser.add_argument("out", type=Path, help="a folder for checkpoints, losses and the model")
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="A.B=VALUE", help="as in YAML")
    arguments = parser.parse_args()
    pretrain(changed(yaml.safe_load(arguments.recipe.read_text(encoding="utf-8")), arguments.changes), arguments.out)


def changed(recipe: Recipe, changes: Iterable[str]) -> Recipe:
    """The recipe with some fields set: `A.B=VALUE`. Exits where it has no A."""
    for change in changes:
        name, equals, value = change.partition("=")
        *groups, last = name.split(".")
        place = recipe
        for group in groups:
            place = place.get(group) if isinstance(place, dict) else None
        if not equals or not isinstance(place, dict):
            raise SystemExit(f"--set {change}: A.B=VALUE is wanted, A one of {', '.join(recipe)}.")
        place[last] = yaml.safe_load(value)
    return recipe


def pretrain(recipe: Recipe, out: Path) -> None:
    """Train as the recipe says. Losses are in nats per token. Exits where the recipe names no texts."""
    check_texts(recipe)
    arguments = TrainingArguments(
        output_dir=str(out),
        eval_strategy="steps",
        report_to="none",
        save_total_limit=1,
        data_seed=recipe["data"]["seed"],
        use_cpu=not torch.accelerator.is_available(),
        **recipe["training"],
    )
    with arguments.main_process_first(local=False, desc="preparing"):
        tokenizer = tokenizer_of(recipe, out)
    model = model_of(recipe, tokenizer)
    data = recipe["data"]
    trainer = RatedTrainer(
        recipe["rates"],
        model=model,
        args=arguments,
        train_dataset=packed(data["train"], tokenizer, data["context"]).shuffle(data["seed"], buffer_size=SHUFFLED),
        eval_dataset=validation_of(data, tokenizer),
        callbacks=[Log(out / "log.jsonl", recipe, model)],
    )
    checkpoints = whole_checkpoints(out)
    trainer.train(resume_from_checkpoint=str(checkpoints[-1]) if checkpoints else None)
    if trainer.state.global_step % arguments.eval_steps:
        trainer.evaluate()
    trainer.save_model(out / "model")
    tokenizer.save_pretrained(out / "model")


def check_texts(recipe: Recipe) -> None:
    """Exit unless the recipe names texts that are there, before anything is made or loaded."""
    data = recipe.get("data") or {}
    for field in ("train", "validation"):
        named = data.get(field)
        for files in named.values() if isinstance(named, dict) and named else [named]:
            if not files or not isinstance(files, str):
                raise SystemExit(f"the recipe names no text as data.{field}: --set data.{field}=FILE")
            if "://" not in files and not glob.glob(files):
                raise SystemExit(
                    f"data.{field}: {files} is not there; a text file, or several with wildcards, is needed."
                )


def validation_of(data: Recipe, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The sequences of the validation text or, where the recipe names several, of each by its name."""
    if isinstance(data["validation"], dict):
        return {
            name: validation_of(data | {"validation": file}, tokenizer) for name, file in data["validation"].items()
        }
    return list(packed(data["validation"], tokenizer, data["context"]).take(data["validation_sequences"]))


def tokenizer_of(recipe: Recipe, out: Path) -> PreTrainedTokenizerBase:
    """The one that the recipe names; otherwise one trained on the text's beginning, once."""
    if path := recipe["tokenizer"].get("path"):
        return AutoTokenizer.from_pretrained(path)
    folder = out / "tokenizer"
    if not folder.is_dir():
        scratch = out / ".tokenizer.new"
        texts = ("\n".join(batch["text"]) for batch in lines_of(recipe["data"]["train"]).iter(LINES))
        texts = islice(texts, FOR_TOKENIZER)
        train_tokenizer(texts, recipe["tokenizer"]["vocabulary"]).save_pretrained(scratch)
        shutil.move(scratch, folder)
    return AutoTokenizer.from_pretrained(folder)


def lines_of(files: str) -> IterableDataset:
    """The lines of text files, as they are wanted."""
    return load_dataset("text", data_files={"train": files}, split="train", streaming=True)


def packed(files: str, tokenizer: PreTrainedTokenizerBase, context: int) -> IterableDataset:
    """Sequences of `context` token ids, one after the other through the text; `labels` are the same."""

    def pack(lines: Mapping[str, list[str]]) -> dict[str, list[list[int]]]:
        text = "\n".join(lines["text"])
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        sequences = [ids[i : i + context] for i in range(0, len(ids) - context + 1, context)]
        return {"input_ids": sequences, "labels": sequences}

    return lines_of(files).map(pack, batched=True, batch_size=LINES, remove_columns=["text"])


def model_of(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A model with random weights, by the seed of the training."""
    kind = recipe["model"]
    config, model = KINDS[kind]
    torch.manual_seed(recipe["training"].get("seed", 0))
    built = model(
        config(
            vocab_size=len(tokenizer),
            max_position_embeddings=recipe["data"]["context"],
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **recipe["sizes"],
            **recipe[kind],
        )
    )
    with torch.no_grad():
        for name, how in recipe["initialise"].items():
            for parameter in named(built, name):
                INITIALISE[next(iter(how))](parameter, next(iter(how.values())))
    for parameter in chain.from_iterable(named(built, name) for name in recipe["freeze"]):
        parameter.requires_grad_(False)
    return built


INITIALISE = {
    "value": torch.nn.init.constant_,
    "std": lambda parameter, std: torch.nn.init.normal_(parameter, std=std),
    "scale": lambda parameter, factor: parameter.mul_(factor),
}


def named(model: PreTrainedModel, name: str) -> Iterator[torch.nn.Parameter]:
    """The parameters whose names end so. Exits where there are none."""
    found = [parameter for full, parameter in model.named_parameters() if f".{full}".endswith(f".{name}")]
    if not found:
        raise SystemExit(f"{type(model).__name__} has no parameter whose name ends with {name!r}.")
    yield from found


def without_folders(recipe: Recipe) -> Recipe:
    """The recipe with the names of its files alone: where they lie says nothing to whoever reads the log."""

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: without(inner) for name, inner in value.items()}
        return Path(value).name if isinstance(value, str) else value

    return recipe | {name: without(recipe[name]) for name in ("data", "tokenizer")}


class RatedTrainer(Trainer):
    """A Trainer with other learning rates for some parameters: by their last names, factors on the rate of the rest."""

    def __init__(self, rates: dict[str, float], **arguments: Any):
        super().__init__(**arguments)
        self.rates = rates

    def create_optimizer(self, *model: PreTrainedModel) -> torch.optim.Optimizer:
        """Transformers' own, with more groups. The model is an argument in some versions, and may be another one."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(*model)
        trained = next(filter(None, model), self.model)
        for name, factor in self.rates.items():
            own = {id(parameter) for parameter in named(trained, name)}
            for group in list(optimizer.param_groups):
                moved = [parameter for parameter in group["params"] if id(parameter) in own]
                if moved:
                    group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
                    optimizer.add_param_group({**group, "params": moved, "lr": group["lr"] * factor})
        return optimizer


class Log(TrainerCallback):
    """Lines of JSON: first what is trained, then losses; after a kill what the last checkpoint does not know is cut."""

    def __init__(self, path: Path, recipe: Recipe, model: PreTrainedModel):
        self.path = path
        self.tokens_a_step = recipe["data"]["context"]
        self.first = {
            "recipe": masked(without_folders(recipe)),
            "parameters": model.num_parameters(),
            "trained": model.num_parameters(only_trainable=True),
            "flops_per_token": flops(model, torch.zeros(1, recipe["data"]["context"], dtype=torch.long))
            / recipe["data"]["context"],
            "versions": {
                "finedeep": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
        self.begin = 0.0

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.begin = time.perf_counter()
        self.tokens_a_step *= args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if not state.is_world_process_zero:
            return
        before = self.path.read_text(encoding="utf-8").splitlines() if state.global_step else []
        kept = [line for line in before if json.loads(line).get("step", 0) <= state.global_step]
        self.path.write_text("\n".join([*(kept or [json.dumps(self.first)]), ""]), encoding="utf-8")
        print(f"{self.first['parameters']:,} parameters, {self.first['flops_per_token']:,.0f} FLOPs per token")

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
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
