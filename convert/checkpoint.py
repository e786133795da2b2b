"""Convert a dense checkpoint into a Finedeep checkpoint."""

import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import LlamaConfig

from .. import configuration_finedeep, modeling_finedeep
from ..configuration_finedeep import FinedeepConfig
from .destination import check_free, whole_folder
from .errors import ConversionError
from .llama import RECOMPUTED, Target, dense_shapes, finedeep_targets
from .neurons import PADDING, contiguous
from .source import INDEX, WEIGHTS, DenseCheckpoint, open_checkpoint, read_json

MAX_SHARD_BYTES = 5 * 10**9
CODE_FILES = (Path(configuration_finedeep.__file__), Path(modeling_finedeep.__file__))
# Fields of a dense config that belong to the folder it came from, not to the model.
NOT_INHERITED = (
    "model_type",
    "architectures",
    "auto_map",
    "transformers_version",
    "_name_or_path",
    "intermediate_size",
)


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


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    num_expert_sublayers: int = 2,
    num_experts_per_sublayer: int = 8,
    routing_input: str = "expert_output",
    routing_function: str = "sigmoid",
    revision: str | None = None,
    progress: bool = True,
) -> Conversion:
    """Cut every FFN of a dense Llama checkpoint into M sub-layers of K experts, with the weights unchanged.

    Gates start at exactly 1. With M = 1 the logits equal the dense model's to rounding; with M >= 2 they do not,
    because the second sub-layer reads a residual stream that the first has already changed.

    Args:
        source: a local folder with a safetensors checkpoint (one file or shards), or a Hub id.
        destination: the folder to make. It must not exist, or be empty.
        num_expert_sublayers: M.
        num_experts_per_sublayer: K. Where M * K does not divide the FFN's width, zero neurons fill it up.
        routing_input: see `FinedeepConfig`.
        routing_function: see `FinedeepConfig`.
        revision: branch, tag or commit of a Hub source.
        progress: whether to show a progress bar on stderr.

    Returns:
        What was done, with the folder.

    Raises:
        ConversionError: the source cannot be converted as asked. Nothing is left at `destination`.
    """
    destination = Path(destination)
    check_free(destination)
    dense = open_checkpoint(source, revision)
    dense_config = _llama_config(dense)
    _check_tensors(dense, dense_config)
    try:
        neurons = contiguous(dense_config.intermediate_size, num_expert_sublayers, num_experts_per_sublayer)
        config = FinedeepConfig(
            **{key: value for key, value in dense_config.to_dict().items() if key not in NOT_INHERITED},
            architectures=["FinedeepForCausalLM"],
            intermediate_size=neurons.numel(),
            num_expert_sublayers=num_expert_sublayers,
            num_experts_per_sublayer=num_experts_per_sublayer,
            routing_input=routing_input,
            routing_function=routing_function,
        )
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConversionError(str(error)) from error
    targets = list(finedeep_targets(dense_config, num_expert_sublayers))
    _check_every_tensor_is_used(dense, targets, config)
    with whole_folder(destination) as folder:
        config.save_pretrained(folder)
        finedeep_parameters = _write_weights(folder, dense, targets, neurons, progress)
        _write_companions(folder, dense)
        for file in CODE_FILES:
            shutil.copyfile(file, folder / file.name)
    return Conversion(
        folder=destination,
        num_expert_sublayers=num_expert_sublayers,
        num_experts_per_sublayer=num_experts_per_sublayer,
        expert_intermediate_size=config.expert_intermediate_size,
        padded_neurons=int((neurons == PADDING).sum()),
        dense_parameters=sum(torch.Size(shape).numel() for shape in dense_shapes(dense_config).values()),
        finedeep_parameters=finedeep_parameters,
    )


def _llama_config(dense: DenseCheckpoint) -> LlamaConfig:
    path = dense.folder / "config.json"
    model_type = dense.config.get("model_type")
    if model_type != "llama":
        raise ConversionError(f"{path} has model_type {model_type!r}; only 'llama' checkpoints can be converted.")
    if dense.config.get("quantization_config"):
        raise ConversionError(f"{path} has a quantization_config; convert the unquantised checkpoint.")
    try:
        return LlamaConfig(**{key: value for key, value in dense.config.items() if key != "model_type"})
    except Exception as error:  # the file is a stranger's, and what a bad one raises differs by version
        raise ConversionError(f"{path} is not a Llama configuration that works: {_one_line(error)}") from error


def _check_tensors(dense: DenseCheckpoint, config: LlamaConfig) -> None:
    """Every tensor that the config asks for is there with its shape, and no other."""
    wanted = dense_shapes(config)
    missing = [name for name in wanted if name not in dense.tensors]
    if missing:
        raise ConversionError(f"{dense.folder} lacks {_some(missing)}, which its config.json asks for.")
    for name, shape in wanted.items():
        if dense.tensors[name].shape != shape:
            raise ConversionError(
                f"{dense.tensors[name].file}: tensor {name} has shape {list(dense.tensors[name].shape)}; "
                f"its config.json asks for {list(shape)}. Checkpoint and config do not belong together."
            )
    unknown = sorted(name for name in dense.tensors if name not in wanted and not name.endswith(RECOMPUTED))
    if unknown == ["lm_head.weight"] and config.tie_word_embeddings:
        if torch.equal(dense.load("lm_head.weight"), dense.load("model.embed_tokens.weight")):
            return
        raise ConversionError(
            f"{dense.folder} ties lm_head.weight to the embeddings (tie_word_embeddings is true), but holds another "
            "lm_head.weight. Set tie_word_embeddings to false in its config.json if that weight is the right one."
        )
    if unknown:
        raise ConversionError(
            f"{dense.folder} holds {_some(unknown)}, which a Llama with its config.json does not have. "
            "If they are biases, attention_bias or mlp_bias is missing from the config."
        )


def _check_every_tensor_is_used(
    dense: DenseCheckpoint, targets: list[tuple[int, Target]], config: FinedeepConfig
) -> None:
    """Every source tensor has a target, and the targets are the model's own tensors, each once."""
    with torch.device("meta"):
        model = modeling_finedeep.FinedeepForCausalLM(config)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    wanted = set(model.state_dict()) - tied
    names = [target.name for _, target in targets]
    used = {target.source for _, target in targets}
    unused = [n for n in dense.tensors if n not in used | tied and not n.endswith(RECOMPUTED)]
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    wrong = {
        "not used": unused,
        "not written": sorted(wanted - set(names)),
        "not in the model": sorted(set(names) - wanted),
        "written twice": twice,
    }
    for what, found in wrong.items():
        if found:
            raise ConversionError(f"the mapping is wrong, tensors {what}: {_some(found)}. This is a bug in Finedeep.")


def _write_weights(
    folder: Path,
    dense: DenseCheckpoint,
    targets: list[tuple[int, Target]],
    neurons: torch.Tensor,
    progress: bool,
) -> int:
    """Write the shards and, if there is more than one, their index. Returns the number of parameters."""
    shards: list[list[str]] = []  # the tensor names in each
    pending: dict[str, torch.Tensor] = {}
    pending_bytes = total_bytes = parameters = 0

    def flush() -> None:
        nonlocal pending, pending_bytes
        shards.append(list(pending))
        path = folder / f"shard-{len(shards)}"
        save_file(pending, path, metadata={"format": "pt"})
        path.chmod((folder / "config.json").stat().st_mode)  # safetensors makes files that only their owner can read
        pending, pending_bytes = {}, 0

    bar = tqdm(targets, desc="Converting", unit=" tensors", disable=None if progress else True)
    for m, target in bar:
        tensor = target.make(dense.load(target.source), neurons[m]).contiguous()
        size = tensor.numel() * tensor.element_size()
        if pending and pending_bytes + size > MAX_SHARD_BYTES:
            flush()
        pending[target.name] = tensor
        pending_bytes += size
        total_bytes += size
        parameters += tensor.numel()
    flush()

    if len(shards) == 1:
        (folder / "shard-1").rename(folder / WEIGHTS)
        return parameters
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file_name)
        weight_map.update(dict.fromkeys(shard, file_name))
    index = {"metadata": {"total_size": total_bytes, "total_parameters": parameters}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return parameters


def _write_companions(folder: Path, dense: DenseCheckpoint) -> None:
    for file in dense.companions():
        if file.name != "tokenizer_config.json":
            shutil.copyfile(file, folder / file.name)
            continue
        content = read_json(file, "the tokenizer's configuration")
        # The user will load this folder with trust_remote_code: it must not point at anybody else's code.
        content.pop("auto_map", None)
        (folder / file.name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _some(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
