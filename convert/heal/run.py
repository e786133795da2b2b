"""Healing: train a converted model as a whole, to say what its dense teacher says, with transformers' `Trainer`."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from finedeep_files.commits import commit_of
from finedeep_files.errors import ConversionError, check_whole_number, one_line
from finedeep_files.hashing import sha256
from finedeep_files.healing_options import HealingOptions
from finedeep_files.json_files import write_json
from finedeep_files.loading_bars import without_loading_bars
from finedeep_files.masking import masked
from finedeep_files.names import LISTED
from finedeep_files.options import SELF, takes_options
from finedeep_files.processes import share
from finedeep_files.progress import in_words, say, seconds_for
from finedeep_files.shards import INDEX, WEIGHTS, save_whole
from finedeep_files.versions import versions
from finedeep_files.working_folder import Contents, WorkingFolder
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PrinterCallback,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME

from ...configuration_finedeep import FinedeepConfig
from ...modeling_finedeep import FinedeepForCausalLM
from ..calibrate.text import SAMPLED, held_out, remove_sampled
from ..code_files import CODE_FILES, copy_code
from ..receipt import NEURONS, RECEIPT, read_receipt, without_place
from ..source import COMPANIONS, DenseCheckpoint, check_finedeep, copy_companion, open_checkpoint
from .adapter import check_not_sharded, merged, with_adapter
from .data import healing_windows
from .options import OWN, check_options
from .trainer import HealingTrainer, TimeLeft
from .training_checkpoints import ArgumentsWithoutSecrets, train_to_the_end

HEALING = "finedeep_healing.json"
HIDDEN_STATES = 10.0  # measured: docs/heal.md
# Times 1 / width, as AdamW's best rate for hidden layers goes (Tensor Programs V, arXiv:2203.03466).
RATE = 0.064
OF_ADAPTERS = 10  # times the rate for all weights, as LoRA's best goes
TRAINING, WINDOWS = "training", "windows.safetensors"
SHARDS = "model-?????-of-?????.safetensors"  # as transformers names them


@dataclass(frozen=True)
class Healed:
    """What healing did: losses on held-out windows, in nats per token, before and after, and what was logged between.

    `log` has what the Trainer logged at each `step`: parts of the training's loss, the held-out windows' under names
    that begin with `eval_`, the learning rate.
    """

    folder: Path
    tokens_seen: int
    before: Mapping[str, float]
    after: Mapping[str, float]
    log: Sequence[Mapping[str, float]] = ()
    processes: int = 1


@takes_options(HealingOptions)
def heal(
    model: str | Path,
    destination: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    **options: Any,
) -> Healed:
    """Train a Finedeep checkpoint on, and save it as another.

    Checkpoints of the training are kept beside the destination, in `.NAME.unfinished`, until it is finished. With
    `accelerate launch` each process calls this; the first one writes.

    Args:
        model: the folder, or the Hub id, of a Finedeep checkpoint.
        destination: the folder to make.
        resume: whether to continue from the last checkpoint of a stopped run of the same healing.
        overwrite: whether to replace the files of a finished run at the destination, as its receipt lists them, and to
            start again where a run was stopped.
        progress: whether to show progress bars and losses on stderr.
        options: the fields of `HealingOptions`.

    Raises:
        ConversionError: the models, the data or the options do not fit, or the destination is not empty. Nothing is
            changed there; checkpoints stay in the hidden folder beside it.
    """
    o = HealingOptions(**options)
    check_options(o)
    work = WorkingFolder(Path(destination), ConversionError, resume, overwrite)
    work.check()
    checkpoint = open_checkpoint(model, check=check_finedeep)
    config = _student_config(checkpoint.folder)
    # Before TrainingArguments: after them, DeepSpeed and FSDP would share the teacher out as it is loaded.
    teacher = _teacher(o.teacher, config) if o.teacher else None
    o = settled(o, config, teacher)
    arguments = _training_arguments(o, work.path / TRAINING, progress)
    files = _files(checkpoint.folder, o)
    if progress and arguments.process_index == 0:
        _announce(o, checkpoint, teacher, arguments)
    with ExitStack() as stack:
        if arguments.process_index == 0:
            # Of several processes each takes its sequences of every batch, so that their number decides the result.
            of_many = {"processes": arguments.world_size, "files": files}
            plan = masked({"model": str(checkpoint.folder.resolve()), **dataclasses.asdict(o), **of_many})
            stack.enter_context(work.begun(_contents(o), plan))
        windows, apart = _prepare(work, checkpoint.folder, config, teacher, o, arguments)
        stack.enter_context(without_loading_bars())
        trainer = _trainer(_student(checkpoint.folder), teacher, o, arguments, windows[apart:], windows[:apart])
        trainer.add_callback(TimeLeft()) if progress else trainer.remove_callback(PrinterCallback)
        train_to_the_end(trainer, work.path / TRAINING)
        before = next(_losses(logs) for logs in trainer.state.log_history if "eval_loss" in logs)
        after = _losses(trainer.evaluate())
        if not all(map(math.isfinite, after.values())):
            raise ConversionError(
                f"training has diverged, the losses are {after}; a learning rate lower than {arguments.learning_rate} "
                "is needed, and a new start (--overwrite): to resume would lead to the same."
            )
        healed = Healed(
            work.destination,
            trainer.state.num_input_tokens_seen,
            before,
            after,
            trainer.state.log_history,
            arguments.world_size,
        )
        _save(work.result, checkpoint, trainer, config, o, files, healed)
    return healed


def settled(o: HealingOptions, config: FinedeepConfig, teacher: PreTrainedModel | None) -> HealingOptions:
    """The options, with what the model's size and its teacher decide where nothing was said."""
    d = config.hidden_size
    rate = RATE / d * (OF_ADAPTERS if o.adapter_rank else 1)
    # Attention is most of a small model's step on a CPU, so short windows pay there (measured: docs/heal.md).
    context = min(o.context or between(64, d, 512), config.max_position_embeddings)
    return dataclasses.replace(
        o,
        context=context,
        batch_size=o.batch_size or between(2048, 32 * d, 8192) // context,
        steps=o.steps or between(500, 10 * d, 1000),
        tokens=o.tokens or min(8192 * d, 2**20),
        learning_rate=rate if o.learning_rate is None else o.learning_rate,
        hidden_states=_hidden_states(o, config, teacher),
    )


def between(least: int, wanted: int, most: int) -> int:
    """What is wanted, as far as it may be."""
    return max(least, min(wanted, most))


def _trainer(
    student: FinedeepForCausalLM,
    teacher: PreTrainedModel | None,
    o: HealingOptions,
    arguments: TrainingArguments,
    windows: torch.Tensor,
    held_out: torch.Tensor,
) -> HealingTrainer:
    """Args: windows and held_out (number, context) token ids."""
    # Checkpoints of the training have no use for the model's own, which some versions refuse to save as it is.
    student.generation_config = GenerationConfig()
    trainer = HealingTrainer(
        teacher=teacher,
        divergence=o.divergence,
        hidden_states=o.hidden_states,
        model=with_adapter(student, o.adapter_rank, o.seed) if o.adapter_rank else student,
        args=arguments,
        # Without labels Trainer would take it that there is no loss to evaluate.
        train_dataset=[{"input_ids": window, "labels": window} for window in windows],
        eval_dataset=[{"input_ids": window, "labels": window} for window in held_out],
    )
    if o.adapter_rank:
        check_not_sharded(trainer)
    return trainer


def _contents(o: HealingOptions) -> Contents:
    """All files of a healing. A text is quickly read again; one that was sampled is worth keeping."""
    code = [file.name for file in CODE_FILES]
    return Contents(
        command="heal",
        result=(WEIGHTS, SHARDS, INDEX, "config.json", *code, *COMPANIONS, NEURONS, RECEIPT, HEALING),
        private=(WINDOWS, SAMPLED.format("*"), f"{TRAINING}/*"),
        kept=(
            f"{TRAINING}/checkpoint-*/{TRAINER_STATE_NAME}",
            *((WINDOWS, SAMPLED.format("*")) if o.data == SELF else ()),
        ),
        receipt=HEALING,
    )


def _announce(
    o: HealingOptions, student: DenseCheckpoint, teacher: PreTrainedModel | None, arguments: TrainingArguments
) -> None:
    """Say what there is to do, and how long that may take."""
    sequences = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    seen = o.steps * sequences * o.context
    of_student = sum(entry.numel for entry in student.tensors.values())
    of_teacher = teacher.num_parameters() if teacher is not None else 0
    sampled = 2 * of_teacher * o.tokens if o.data == SELF else 0
    seconds = seconds_for((6 * of_student + 2 * of_teacher) * seen + sampled, arguments.device)
    text = "sampled from the teacher" if o.data == SELF else f"of {without_place(o.data)}"
    say(
        f"Healing on {o.tokens:,} tokens {text}: {o.steps:,} steps of {sequences} x {o.context} tokens, {seen:,} in "
        f"all; at least {in_words(seconds / arguments.world_size)}"
    )


def _student_config(model: Path) -> FinedeepConfig:
    """The model's configuration. Raises `ConversionError` where it is broken."""
    try:
        config = FinedeepConfig.from_pretrained(model)
        check_whole_number("hidden_size", config.hidden_size, 1)  # which transformers 5.0 takes as it comes
    except Exception as error:  # the file may be a stranger's, and what a bad one raises differs by version
        raise ConversionError(f"{model}/config.json is no Finedeep configuration that works: {one_line(error)}") from (
            error
        )
    if config.max_position_embeddings < 2:
        raise ConversionError(
            f"{model}/config.json has max_position_embeddings={config.max_position_embeddings}; at least 2 are needed, "
            "a token to read and one to predict."
        )
    return config


def _teacher(teacher: str, student: FinedeepConfig) -> PreTrainedModel:
    """The teacher, in its own dtype; on a CPU in float32, where half precision is slow."""
    dtype = "auto" if torch.accelerator.is_available() else torch.float32
    try:
        config = AutoConfig.from_pretrained(teacher, trust_remote_code=False)
        if config.vocab_size != student.vocab_size:
            raise ConversionError(
                f"the teacher {teacher} has {config.vocab_size} tokens and the model {student.vocab_size}; a teacher "
                "of the same vocabulary is needed, such as the dense model that it was converted from."
            )
        return AutoModelForCausalLM.from_pretrained(
            teacher, config=config, dtype=dtype, trust_remote_code=False, use_safetensors=True
        )
    except ConversionError:
        raise
    except Exception as error:  # a stranger's files, and what bad ones raise differs by version
        raise ConversionError(f"the teacher {teacher} cannot be loaded ({one_line(error)}).") from error


def _student(model: Path) -> FinedeepForCausalLM:
    """The model, in float32. Raises `ConversionError` unless its file has each of its tensors and no other."""
    try:
        student, found = FinedeepForCausalLM.from_pretrained(
            model, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # as above
        raise ConversionError(f"{model} cannot be loaded ({one_line(error)}).") from error
    for what in ("missing", "unexpected"):
        if names := found[f"{what}_keys"]:
            raise ConversionError(
                f"{model} has tensors that are {what}: {', '.join(sorted(names)[:5])}. Weights and config.json do not "
                "belong together; convert again."
            )
    return student


def _hidden_states(o: HealingOptions, student: FinedeepConfig, teacher: PreTrainedModel | None) -> float:
    """Their weight. Raises `ConversionError` where one is asked for and the teacher's hidden states differ in shape."""
    if teacher is None:
        return 0.0
    of_teacher = teacher.config.get_text_config()
    shapes = [(c.num_hidden_layers, c.hidden_size) for c in (of_teacher, student)]
    if shapes[0] == shapes[1]:
        default = HIDDEN_STATES if o.divergence else 0.0
        return default if o.hidden_states is None else o.hidden_states
    if o.hidden_states:
        raise ConversionError(
            f"the teacher {o.teacher} has {shapes[0][0]} layers of size {shapes[0][1]} and the model {shapes[1][0]} of "
            f"{shapes[1][1]}, so that hidden states cannot be compared; hidden_states=0 goes without."
        )
    return 0.0


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
        "ddp_timeout": 6 * 3600,  # others wait while the first process reads a text
        "ddp_find_unused_parameters": False,
        "save_total_limit": 1,
        "seed": o.seed,
        "use_cpu": not torch.accelerator.is_available(),
        "report_to": "none",
        "disable_tqdm": not progress,
        **o.training,
        **OWN,
        "output_dir": str(work),
    }
    try:
        arguments = ArgumentsWithoutSecrets(**fields)
    except ImportError as error:
        raise ConversionError("healing wants accelerate, for transformers' Trainer: pip install accelerate.") from error
    except (TypeError, ValueError) as error:
        raise ConversionError(f"TrainingArguments: {one_line(error)}") from error
    if arguments.n_gpu > 1 and o.hidden_states:
        raise ConversionError(
            f"{arguments.n_gpu} devices are seen by one process; start one process for each: accelerate launch -m "
            "finedeep_cli heal ... (or CUDA_VISIBLE_DEVICES=0 for one alone)."
        )
    return arguments


def _prepare(
    work: WorkingFolder,
    model: Path,
    config: FinedeepConfig,
    teacher: PreTrainedModel | None,
    o: HealingOptions,
    arguments: TrainingArguments,
) -> tuple[torch.Tensor, int]:
    """The windows (number, context), and how many of them, the first ones, are held out. The first process saves them.

    Raises:
        ConversionError: there are fewer than two.
    """
    path, process = work.path / WINDOWS, arguments.process_index
    if share(not path.exists()) and (process == 0 or o.data == SELF):  # sampling is shared out
        sampler = teacher.to(arguments.device) if teacher is not None else None
        progress = not arguments.disable_tqdm and process == 0
        found = healing_windows(
            o.data, model, config.vocab_size, o.context, o.tokens, sampler, o.seed, progress, work.path
        )
        if process == 0:
            _check_enough(found, o)
            save_whole({"windows": found.contiguous()}, path)
            remove_sampled(work.path)
    share(None)  # has saved them
    windows = load_file(path)["windows"]
    return windows, held_out(windows)


def _check_enough(windows: torch.Tensor, o: HealingOptions) -> None:
    if len(windows) <= held_out(windows):
        raise ConversionError(
            f"{o.data} gives {len(windows)} windows of {o.context} tokens; at least 2 are needed, one to learn "
            "from and one to check on. Name more data or a smaller context."
        )


def _files(model: Path, o: HealingOptions) -> dict[str, Any]:
    """What has to be the same beside the options: the text by its hash, weights by size and time, or by commit."""
    folders = [Path(folder) for folder in (model, o.teacher) if folder is not None]
    weights = [file.stat() for folder in folders for file in sorted(folder.glob("*.safetensors"))]
    return {
        "text": sha256(Path(o.data)) if Path(o.data).is_file() else None,
        "weights": [[found.st_size, found.st_mtime_ns] for found in weights],
        "teacher": commit_of(o.teacher) if o.teacher and not Path(o.teacher).is_dir() else None,
    }


def _losses(logs: Mapping[str, float]) -> dict[str, float]:
    """The held-out losses of an evaluation, in nats per token."""
    return {name: logs[f"eval_{name}"] for name in ("next_token", "divergence") if f"eval_{name}" in logs}


def _save(
    folder: Path,
    model: DenseCheckpoint,
    trainer: HealingTrainer,
    config: FinedeepConfig,
    o: HealingOptions,
    files: Mapping[str, Any],
    healed: Healed,
) -> None:
    """Write the healed model into a folder, each tensor in the dtype that it had."""
    student = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    if o.adapter_rank:
        student = merged(student)
        state = student.state_dict()
    else:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        state = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}  # torch.compile's
        if config.tie_word_embeddings:
            state.pop("lm_head.weight", None)
        stored = {name: held.dtype for name, held in model.tensors.items()}
        state = {name: tensor.to(stored.get(name, tensor.dtype)) for name, tensor in state.items()}
        student.save_pretrained(folder, state_dict=state)
        (folder / "generation_config.json").unlink(missing_ok=True)  # it was the training's
        config.save_pretrained(folder)  # which names the dtype that it had, not the training's
        for file in folder.glob("*.py"):  # of the class's module, which under FSDP2 is torch's
            file.unlink()
        copy_code(folder)
        _write_companions(model, folder, o, files, healed)
    trainer.accelerator.wait_for_everyone()


def _write_companions(
    model: DenseCheckpoint, folder: Path, o: HealingOptions, files: Mapping[str, Any], healed: Healed
) -> None:
    """What belongs to the model beside its weights, and the receipts: the conversion's, and healing's own."""
    for file in (*model.companions(), *model.folder.glob(NEURONS)):
        copy_companion(file, model.folder, folder)
    teacher = Path(o.teacher) if o.teacher and Path(o.teacher).is_dir() else None
    receipt = {
        "options": {**dataclasses.asdict(o), "data": without_place(o.data), "teacher": without_place(o.teacher)},
        "data_sha256": files["text"],
        "teacher_revision": files["teacher"],
        "teacher_sha256": {f.name: sha256(f) for f in sorted(teacher.glob("*.safetensors"))} if teacher else None,
        "processes": healed.processes,
        "tokens_seen": healed.tokens_seen,
        "held_out_nats_per_token": {"before": healed.before, "after": healed.after},
        "log": healed.log,
        "versions": versions("accelerate"),
    }
    write_json(folder / HEALING, masked(receipt))
    if (model.folder / RECEIPT).is_file():
        receipt = {key: value for key, value in read_receipt(model.folder).items() if key != LISTED}
        write_json(folder / RECEIPT, masked({**receipt, "exact": False, "healing": HEALING}))
