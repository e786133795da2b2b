"""Healing: train a converted model as a whole, to say what its dense teacher says, with transformers' `Trainer`."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from ..configuration_finedeep import FinedeepConfig
from ..modeling_finedeep import FinedeepForCausalLM
from .calibration_text import SELF
from .destination import check_free, whole_folder
from .errors import ConversionError
from .healing_data import healing_windows
from .loading_bars import without_loading_bars
from .receipt import NEURONS, PACKAGES, RECEIPT
from .shards import save_whole
from .source import COMPANIONS, read_json

HEALING = "finedeep_healing.json"
PLAN, WINDOWS, BEFORE = "plan.json", "windows.safetensors", "before.json"
HELD_OUT = 1 / 16  # of the windows


@dataclass(frozen=True)
class HealingOptions:
    """What the user asked for; the fields of the receipt's `options`."""

    data: str = SELF
    teacher: str | None = None
    divergence: float | None = (
        None  # the share of KL(teacher || student) in the loss; by default 1 with a teacher, else 0
    )
    tokens: int = 1_048_576
    context: int = 512  # or as many as the model has positions for
    steps: int = 1000
    batch_size: int = 16
    learning_rate: float = 1e-3
    seed: int = 0
    training: Mapping[str, Any] = field(default_factory=dict)  # fields of transformers' TrainingArguments

    def __post_init__(self) -> None:
        if self.divergence is None:
            object.__setattr__(self, "divergence", 0.0 if self.teacher is None else 1.0)

    def check(self) -> None:
        """Raise `ConversionError` for an option that cannot be met."""
        for name in ("tokens", "context", "steps", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConversionError(f"{name}={value!r} is not a whole number of at least 1.")
        if not 0 <= self.divergence <= 1:
            raise ConversionError(
                f"divergence={self.divergence} is not between 0 (next token only) and 1 (teacher only)."
            )
        if self.teacher is None and (self.divergence > 0 or self.data == SELF):
            wanted = "to sample the text from" if self.data == SELF else f"for divergence={self.divergence}"
            raise ConversionError(f"a teacher is wanted {wanted}; name the dense model (--teacher).")
        unknown = set(self.training) - {f.name for f in dataclasses.fields(TrainingArguments)}
        if unknown:
            raise ConversionError(f"{', '.join(sorted(unknown))}: no field of transformers' TrainingArguments.")


@dataclass(frozen=True)
class Healed:
    """What healing did: losses on held-out windows, in nats per token, before and after."""

    folder: Path
    tokens_seen: int
    before: Mapping[str, float]
    after: Mapping[str, float]


class HealingTrainer(Trainer):
    """`Trainer` with the loss (1 - divergence) * next-token loss + divergence * KL(teacher || student), in nats."""

    def __init__(self, *, teacher: PreTrainedModel | None, divergence: float, **kwargs: Any):
        super().__init__(**kwargs)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over a batch whose sequences are of one length
        self.divergence = divergence
        self.teacher = teacher.eval().requires_grad_(False) if teacher is not None else None
        self.parts: dict[str, list[torch.Tensor]] = {}

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, torch.Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Args: inputs with `input_ids` (batch, seq), every one of them text."""
        ids = inputs["input_ids"]
        outputs = model(input_ids=ids, use_cache=False)
        logits = outputs.logits.float()
        parts = {"next_token": nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())}
        if self.teacher is not None:
            with torch.no_grad():
                wanted = self.teacher(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
            divergence = nn.functional.kl_div(logits.log_softmax(-1), wanted, log_target=True, reduction="none")
            parts["divergence"] = divergence.sum(-1).mean()
        for name, value in parts.items():
            self.parts.setdefault(f"{'' if model.training else 'eval_'}{name}", []).append(value.detach())
        loss = (1 - self.divergence) * parts["next_token"] + self.divergence * parts.get("divergence", 0.0)
        return (loss, {"logits": outputs.logits}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the two parts of the loss beside it."""
        prefix = "eval_" if any(name.startswith("eval_") for name in logs) else ""
        for name in [name for name in self.parts if name.startswith("eval_") == bool(prefix)]:
            logs[name] = torch.stack(self.parts.pop(name)).mean().item()
        super().log(logs, *args, **kwargs)


def heal(
    model: str | Path,
    destination: str | Path,
    *,
    resume: bool = False,
    progress: bool = True,
    **options: Any,
) -> Healed:
    """Train a Finedeep checkpoint on, and save it as another.

    Checkpoints of the training are kept beside the destination, in `.NAME.healing`, until it is finished. With
    `accelerate launch` each process calls this; the first one writes.

    Args:
        model: the folder of a Finedeep checkpoint.
        destination: the folder to make. It must not exist, or be empty.
        resume: whether to go on from the last checkpoint of a stopped run of the same healing.
        progress: whether to show progress bars and losses on stderr.
        options: the fields of `HealingOptions`.

    Raises:
        ConversionError: the models, the data or the options do not fit. Nothing is left at `destination`.
    """
    model, destination, o = Path(model), Path(destination), HealingOptions(**options)
    o.check()
    check_free(destination)
    config = _student_config(model)
    o = dataclasses.replace(o, context=min(o.context, config.max_position_embeddings))
    teacher_config = _teacher_config(o.teacher, config) if o.teacher else None
    work = Path(f"{destination.absolute().parent}/.{destination.name}.healing")
    arguments = _training_arguments(o, work, progress)
    fresh = not work.exists()
    try:
        with arguments.main_process_first(desc="preparing"):
            if arguments.process_index == 0:
                _begin(work, {"model": str(model.resolve()), **dataclasses.asdict(o)}, resume)
            teacher = _teacher(o.teacher, teacher_config).to(arguments.device) if o.teacher else None
            windows = _windows(work, model, config, teacher, o, progress)
        held = max(1, round(len(windows) * HELD_OUT))
        if len(windows) <= held:
            raise ConversionError(
                f"{o.data} gives {len(windows)} windows of {o.context} tokens; 2 are wanted at least, one to learn "
                "from and one to check on. Name more data or a smaller context."
            )
    except ConversionError:
        if fresh:
            shutil.rmtree(work, ignore_errors=True)
        raise
    with without_loading_bars():
        student = FinedeepForCausalLM.from_pretrained(model, dtype=torch.float32)
        trainer = HealingTrainer(
            teacher=teacher,
            divergence=o.divergence,
            model=student,
            args=arguments,
            # Without labels Trainer would take it that there is no loss to evaluate.
            train_dataset=[{"input_ids": window, "labels": window} for window in windows[held:]],
            eval_dataset=[{"input_ids": window, "labels": window} for window in windows[:held]],
        )
        if not progress:
            trainer.remove_callback(PrinterCallback)
        before = _before(work, trainer)
        last = get_last_checkpoint(work) if resume else None
        trainer.train(resume_from_checkpoint=last)
        after = _losses(trainer)
        seen = o.steps * o.batch_size * arguments.gradient_accumulation_steps * arguments.world_size * o.context
        healed = Healed(destination, seen, before, after)
        _save(model, destination, trainer, config, o, healed)
        return healed


def _student_config(model: Path) -> FinedeepConfig:
    fields = read_json(model / "config.json", "a Finedeep model's configuration")
    if fields.get("model_type") != FinedeepConfig.model_type:
        raise ConversionError(
            f"{model} has model_type {fields.get('model_type')!r}; a Finedeep checkpoint is wanted, as `finedeep "
            "convert` makes it."
        )
    return FinedeepConfig.from_pretrained(model)


def _teacher_config(teacher: str, student: FinedeepConfig) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(teacher)
    except (OSError, ValueError) as error:
        raise ConversionError(
            f"the teacher {teacher} cannot be loaded ({' '.join(str(error).split())[:300]})."
        ) from error
    if config.vocab_size != student.vocab_size:
        raise ConversionError(
            f"the teacher {teacher} has {config.vocab_size} tokens and the model {student.vocab_size}; a teacher of "
            "the same vocabulary is wanted, such as the dense model that it was converted from."
        )
    return config


def _teacher(teacher: str, config: PretrainedConfig) -> PreTrainedModel:
    """The teacher, in its own dtype; on a CPU in float32, where half precision is slow."""
    dtype = "auto" if torch.accelerator.is_available() else torch.float32
    return AutoModelForCausalLM.from_pretrained(teacher, config=config, dtype=dtype)


def _training_arguments(o: HealingOptions, work: Path, progress: bool) -> TrainingArguments:
    often = max(1, o.steps // 10)
    fields = {
        "max_steps": o.steps,
        "per_device_train_batch_size": o.batch_size,
        "per_device_eval_batch_size": o.batch_size,
        "learning_rate": o.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": often,
        "adam_beta2": 0.95,
        "weight_decay": 0.0,
        "logging_steps": often,
        "save_steps": often,
        "save_total_limit": 1,
        "seed": o.seed,
        "use_cpu": not torch.accelerator.is_available(),
        "report_to": "none",
        "disable_tqdm": not progress,
        **o.training,
        "output_dir": str(work),
        "prediction_loss_only": True,
        "remove_unused_columns": False,
    }
    try:
        return TrainingArguments(**fields)
    except ImportError as error:
        raise ConversionError("healing wants accelerate, for transformers' Trainer: pip install accelerate.") from error
    except (TypeError, ValueError) as error:
        raise ConversionError(f"TrainingArguments: {' '.join(str(error).split())}") from error


def _begin(work: Path, plan: Mapping[str, Any], resume: bool) -> None:
    """Make the folder of a new run, or check that a stopped one was the same."""
    path, plan = work / PLAN, json.loads(json.dumps(plan))
    if not work.exists():
        work.mkdir(parents=True)
        path.write_text(json.dumps(plan), encoding="utf-8")
        return
    if not resume:
        raise ConversionError(
            f"{work} is what a stopped run has left: go on with --resume, or remove it to start again."
        )
    before = read_json(path, "what the stopped run was to do")
    if before != plan:
        changed = sorted(key for key in {*plan, *before} if plan.get(key) != before.get(key))
        raise ConversionError(
            f"the run that stopped was another one: {', '.join(changed)} differ. Give what it was started with, or "
            f"remove {work} to start again."
        )


def _windows(
    work: Path, model: Path, config: FinedeepConfig, teacher: PreTrainedModel | None, o: HealingOptions, progress: bool
) -> torch.Tensor:
    path = work / WINDOWS
    if not path.exists():
        windows = healing_windows(o.data, model, config.vocab_size, o.context, o.tokens, teacher, o.seed, progress)
        save_whole({"windows": windows.contiguous()}, path)
    return load_file(path)["windows"]


def _losses(trainer: HealingTrainer) -> dict[str, float]:
    """Held-out losses, in nats per token."""
    metrics = trainer.evaluate()
    return {name: metrics[f"eval_{name}"] for name in ("next_token", "divergence") if f"eval_{name}" in metrics}


def _before(work: Path, trainer: HealingTrainer) -> dict[str, float]:
    """The losses before the first step, which a run that goes on reads."""
    path = work / BEFORE
    if path.exists():
        return read_json(path, "the losses before healing")
    losses = _losses(trainer)
    if trainer.is_world_process_zero():
        path.write_text(json.dumps(losses), encoding="utf-8")
    return losses


def _save(
    model: Path, destination: Path, trainer: HealingTrainer, config: FinedeepConfig, o: HealingOptions, healed: Healed
) -> None:
    """Write the healed model as a whole folder, in the dtype of the one it came from."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.is_world_process_zero():
        return
    student = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    dtype = config.dtype or torch.float32
    with whole_folder(destination, {}) as folder:
        student.save_pretrained(folder, state_dict={name: tensor.to(dtype) for name, tensor in state.items()})
        config.save_pretrained(folder)  # which names the dtype of the file, not of the training
        for pattern in (*COMPANIONS, RECEIPT, NEURONS):
            for file in model.glob(pattern):
                if not (folder / file.name).exists():
                    shutil.copyfile(file, folder / file.name)
        receipt = {
            "options": dataclasses.asdict(o),
            "tokens_seen": healed.tokens_seen,
            "held_out_nats_per_token": {"before": healed.before, "after": healed.after},
            "versions": {package: version(package) for package in (*PACKAGES, "accelerate")},
        }
        (folder / HEALING).write_text(json.dumps(receipt, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(trainer.args.output_dir)
