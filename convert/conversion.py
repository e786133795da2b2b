"""Convert a dense checkpoint into a Finedeep checkpoint."""

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from finedeep_files.conversion_options import Options
from finedeep_files.errors import ConversionError
from finedeep_files.hashing import sha256
from finedeep_files.json_files import read_json, write_json
from finedeep_files.options import SELF, takes_options
from finedeep_files.processes import is_first_process, share
from finedeep_files.shards import INDEX, FolderWriter, write_index
from finedeep_files.versions import versions
from finedeep_files.working_folder import Contents, WorkingFolder
from tqdm import tqdm

from .assignment import FORMULAS, assign
from .calibrate.run import LAYER, WINDOWS, Calibration, LayerErrors, best_device
from .calibrate.text import SAMPLED
from .code_files import CODE_FILES, copy_code
from .cut import made
from .plan import Plan, make_plan, same_plan
from .receipt import NEURONS, RECEIPT, read_neuron_table, write_neuron_table, write_receipt
from .source import COMPANIONS, TOKENIZER_CONFIG, DenseCheckpoint, copy_companion, open_checkpoint
from .tensor_mapping import Target
from .tokenization import keep_tokens

SMALL_FILES = 50 * 10**6  # a generous share of the disk for tokenizer, code and configuration


@dataclass(frozen=True)
class Conversion:
    """What a conversion did. Sizes are numbers of parameters, tied ones counted once."""

    folder: Path
    num_expert_sublayers: int
    num_experts_per_sublayer: int
    expert_intermediate_size: int
    padded_neurons: int
    dense_parameters: int
    finedeep_parameters: int
    exact: bool
    calibration: list[LayerErrors]


@takes_options(Options)
def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    revision: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    **options: Any,
) -> Conversion | None:
    """Cut every FFN of a dense checkpoint into M sub-layers of K experts, with the weights unchanged.

    Gates start at exactly 1. With M = 1, and in grow mode, the logits equal the dense model's to rounding; otherwise
    they do not, because the second sub-layer reads a residual stream that the first has already changed.

    Weights go from file to file one tensor at a time. The folder appears at `destination` when it is complete. With
    `accelerate launch` or torchrun each process calls this; they share calibration out, and the first one writes.

    Args:
        source: a local folder with a safetensors checkpoint (one file or shards), or a Hub id.
        destination: the folder to make.
        revision: branch, tag or commit of a Hub source.
        resume: whether to continue from what a stopped run of the same conversion has finished.
        overwrite: whether to replace the files of a finished run at the destination, as its receipt lists them, and to
            start again where a run was stopped.
        progress: whether to show a progress bar on stderr.
        options: the fields of `Options`, among them `num_expert_sublayers` (M), `num_experts_per_sublayer` (K; where
            M * K does not divide the FFN's width, zero neurons fill it up), `mode`, `assignment`, `seed`, `dtype` and
            `max_shard_size`.

    Returns:
        What was done, with the folder; None in all processes but the first.

    Raises:
        ConversionError: the source cannot be converted as asked, or the destination is not empty. Nothing is changed
            there; what is finished stays in the hidden folder beside it.
    """
    work = WorkingFolder(Path(destination), ConversionError, resume, overwrite)
    if is_first_process():
        work.check()
    plan = plan_conversion(source, revision=revision, **options)
    if not is_first_process():
        if plan.options.calibrates:
            share(None)  # the first has made its folder
            Calibration(plan, work.path, progress=False).run()
        return None
    if plan.much_padding:
        warnings.warn(plan.much_padding, stacklevel=2)
    work.check_room(plan.nbytes + _kept_bytes(plan) + SMALL_FILES)
    same = {**same_plan(plan), "versions": versions()}
    if plan.options.calibrates:
        same["device"] = best_device().type
    with work.begun(_contents(plan), same) as folder, _background() as background:
        hashes = {file.name: background.submit(sha256, file) for file in plan.dense.files}
        calibration = Calibration(plan, work.path, progress) if plan.options.calibrates else None
        if calibration is not None:
            share(None)
            calibration.run()
        neurons = _neurons_of(plan, calibration, folder, progress)
        with _one_thread():
            _write_weights(folder, plan, neurons, calibration, progress)
        _write_beside(folder, plan)
        found = {name: future.result() for name, future in hashes.items()}
        record = calibration.record() if calibration is not None else None
        errors = calibration.errors() if calibration is not None else []
        write_receipt(folder, plan, *_name_and_revision(source, plan.dense), found, record)
    return Conversion(
        folder=work.destination,
        num_expert_sublayers=plan.options.num_expert_sublayers,
        num_experts_per_sublayer=plan.options.num_experts_per_sublayer,
        expert_intermediate_size=plan.config.expert_intermediate_size,
        padded_neurons=plan.padded_neurons,
        dense_parameters=plan.dense_parameters,
        finedeep_parameters=plan.finedeep_parameters,
        exact=plan.exact,
        calibration=errors,
    )


def _kept_bytes(plan: Plan) -> int:
    """Of the calibrated layers, which are kept on the disk until all are there, and then written into their shards."""
    if not plan.options.calibrates:
        return 0
    return sum(e.nbytes for shard in plan.shards for e in shard.entries if ".sublayers." in e.name)


def _name_and_revision(source: str | Path, dense: DenseCheckpoint) -> tuple[str, str | None]:
    """What a receipt calls the source: a Hub id with its commit, or the name of a folder."""
    if Path(source).is_dir():
        return dense.folder.resolve().name, None
    return str(source), dense.folder.name


def _write_beside(folder: Path, plan: Plan) -> None:
    """All that lies beside the weights but the receipt."""
    write_index(folder, plan.shards)
    plan.config.save_pretrained(folder)
    _write_companions(folder, plan.dense)
    copy_code(folder)
    keep_tokens(plan.dense.folder, folder, plan.config.vocab_size)


@takes_options(Options)
def plan_conversion(source: str | Path, *, revision: str | None = None, **options: Any) -> Plan:
    """What `convert_checkpoint` would do: reads the configuration and the headers, writes nothing."""
    return make_plan(open_checkpoint(source, revision), Options(**options))


def _contents(plan: Plan) -> Contents:
    """All files of a conversion. A text is quickly read again; one that was sampled is worth keeping."""
    shards = [shard.file_name for shard in plan.shards]
    code = [file.name for file in CODE_FILES]
    layers = [LAYER.format("*")] if plan.options.calibrates else []
    windows = [WINDOWS, SAMPLED.format("*")] if layers else []
    sampled = windows if plan.options.calibrate == SELF else []
    return Contents(
        command="convert",
        result=(*shards, INDEX, "config.json", *code, *COMPANIONS, NEURONS, RECEIPT),
        private=(*windows, *layers),
        kept=(*(f"result/{name}" for name in (*shards, NEURONS)), *layers, *sampled),
        receipt=RECEIPT,
    )


def _neurons_of(plan: Plan, calibration: Calibration | None, folder: Path, progress: bool) -> list[torch.Tensor]:
    """For each layer, (M, K, e) numbers of dense neurons; in grow mode the first sub-layer has them all.

    Measured ones are kept in the folder: measured again by a resumed run, they need not come out the same.
    """
    layers = range(plan.dense_config.num_hidden_layers)
    if calibration is not None:
        neurons = [calibration.neurons(i) for i in layers]
    elif (folder / NEURONS).exists():
        neurons = read_neuron_table(folder, len(layers), plan.dense_config.intermediate_size)
    else:
        neurons = _assigned(plan, progress)
    if plan.options.assignment not in FORMULAS:
        write_neuron_table(folder, neurons)
    return neurons


def _assigned(plan: Plan, progress: bool) -> list[torch.Tensor]:
    """As `_neurons_of`, by the assignment that was asked for, which may measure."""

    @cache
    def activities() -> list[torch.Tensor]:
        from .calibrate.neuron_statistics import mean_activity

        if plan.options.text is None:
            raise ConversionError(
                f"assignment {plan.options.assignment!r} measures activity on a text; name one (--assignment-text, or "
                "text=)."
            )
        return mean_activity(plan.dense.folder, plan.dense_config, Path(plan.options.text), progress)

    def not_measured() -> torch.Tensor:
        raise ConversionError("nonlinearity is measured in calibration only; add --calibrate (calibrate=).")

    return [
        assign(plan.options.assignment, plan.layer(i, lambda i=i: activities()[i], not_measured))
        for i in range(plan.dense_config.num_hidden_layers)
    ]


@contextmanager
def _background() -> Iterator[ThreadPoolExecutor]:
    """A thread whose waiting work is dropped when this ends, so that nobody waits for hashes after an error."""
    thread = ThreadPoolExecutor(1)
    try:
        yield thread
    finally:
        thread.shutdown(cancel_futures=True)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch to one thread: reading, hashing and writing, each in a thread of its own, are what takes time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _write_weights(
    folder: Path, plan: Plan, neurons: list[torch.Tensor], calibration: Calibration | None, progress: bool
) -> None:
    """Write the shards that are not there yet."""
    missing = [shard for shard in plan.shards if not (folder / shard.file_name).exists()]
    sizes = {entry.name: entry.nbytes for shard in missing for entry in shard.entries}
    by_layer: dict[int, list[Target]] = {}
    for target in plan.targets:
        if target.name in sizes:
            by_layer.setdefault(target.layer, []).append(target)
    bar = tqdm(total=plan.nbytes, desc="Converting", unit="B", unit_scale=True, disable=None if progress else True)
    bar.update(plan.nbytes - sum(sizes.values()))
    with bar, FolderWriter(folder, missing) as writer:
        for layer, wanted in by_layer.items():
            calibrated = calibration.tensors(layer) if calibration is not None and layer >= 0 else {}
            for target, blocks in made(plan, wanted, neurons, calibrated):
                for rows in blocks:
                    writer.write(target.name, rows)
                bar.update(sizes[target.name])


def _write_companions(folder: Path, dense: DenseCheckpoint) -> None:
    for file in dense.companions():
        copy = copy_companion(file, dense.folder, folder)
        if file.name == TOKENIZER_CONFIG:
            content = read_json(file, "the tokenizer's configuration")
            # The user will load this folder with trust_remote_code: it must not point at anybody else's code.
            content.pop("auto_map", None)
            write_json(copy, content)
