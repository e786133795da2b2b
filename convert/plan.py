"""What a conversion will do: decided from headers and configurations, before any weight is read or anything written."""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from finedeep_files.conversion_options import MODES, Options
from finedeep_files.errors import ConversionError, one_line
from finedeep_files.hashing import sha256
from finedeep_files.shards import Entry, Shard, plan_shards
from finedeep_files.sizes import parse_size, size
from transformers import LlamaConfig, PretrainedConfig

from ..configuration_finedeep import FinedeepConfig
from .assignment import Layer, layer_generator
from .families import FAMILIES, Family
from .source import DenseCheckpoint
from .tensor_mapping import Target, dense_shapes, family_config, pieces, some, targets
from .validation import check_layers, check_numbers, check_options, check_tensors

Measure = Callable[[], torch.Tensor]
MUCH_PADDING = 0.1  # of the FFN's width
# Calibration's size where none is given. From fewer tokens least squares learns by heart, sub-layers being that wide;
# more steps brought nothing beyond the spread over seeds (docs/heal.md).
LEAST_TOKENS, TOKENS_PER_NEURON, STEPS = 65_536, 64, 100
CAST = {"keep": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Fields of a dense config that belong to the folder it came from or to its classes, not to the model.
NOT_INHERITED = {
    "model_type",
    "architectures",
    "auto_map",
    "transformers_version",
    "_name_or_path",
    "attn_implementation",  # which may not be installed here
    "_attn_implementation",
    "_attn_implementation_internal",
    "intermediate_size",
    "num_labels",
    "id2label",
    "label2id",
    "dtype",
    "torch_dtype",
}
ROPE_FIELDS = {"rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings"}


@dataclass(frozen=True)
class Plan:
    """A conversion that can be carried out."""

    dense: DenseCheckpoint
    dense_config: PretrainedConfig
    config: FinedeepConfig
    options: Options
    targets: list[Target]
    shards: list[Shard]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors to write."""
        return sum(shard.nbytes for shard in self.shards)

    @cached_property
    def dense_parameters(self) -> int:
        """Parameters before, tied ones once."""
        return sum(torch.Size(shape).numel() for shape in dense_shapes(self.dense_config).values())

    @property
    def finedeep_parameters(self) -> int:
        """Parameters after, tied ones once."""
        return sum(entry.numel for shard in self.shards for entry in shard.entries)

    @property
    def padded_neurons(self) -> int:
        """Zero neurons in each decoder layer that fill the experts up."""
        width = self.config.intermediate_size
        if self.options.mode == "grow":
            width //= self.options.num_expert_sublayers
        return width - self.dense_config.intermediate_size

    @property
    def much_padding(self) -> str | None:
        """A line, where padding makes a good part of the FFN: how much, and with which K there would be none."""
        width, o = self.dense_config.intermediate_size, self.options
        if self.padded_neurons <= MUCH_PADDING * width:
            return None
        sublayers = 1 if o.mode == "grow" else o.num_expert_sublayers
        fitting = [K for K in range(1, width + 1) if width % (K * sublayers) == 0]
        nearest = min(fitting, key=lambda K: abs(K - o.num_experts_per_sublayer), default=None)
        instead = f"K={nearest} is the nearest without" if nearest else f"no K goes without, with M={sublayers}"
        return (
            f"M={o.num_expert_sublayers} sub-layers of K={o.num_experts_per_sublayer} experts fill the FFN's {width} "
            f"neurons up with {self.padded_neurons} of padding ({self.padded_neurons / width:.0%}); {instead}."
        )

    @property
    def exact(self) -> bool:
        """Whether the logits will equal the dense model's."""
        return self.options.exact

    def layer(self, i: int, activity: Measure, nonlinearity: Measure) -> Layer:
        """What an assignment may know of layer i; the last two measure, (width,) each, when they are called."""
        piece = next(t.piece for t in self.targets if t.layer == i and t.name.endswith("gate_proj.weight"))
        return Layer(
            index=i,
            width=self.dense_config.intermediate_size,
            num_sublayers=1 if self.options.mode == "grow" else self.options.num_expert_sublayers,
            num_experts=self.options.num_experts_per_sublayer,
            generator=layer_generator(self.options.seed, i),
            gate=lambda: self.dense.load(piece.stored).narrow(0, piece.start, piece.rows),
            activity=activity,
            nonlinearity=nonlinearity,
        )

    @property
    def memory(self) -> int:
        """Bytes of weights and activations in memory at a time, roughly: a tensor as it is read and as it is written.

        Calibration has, in float32, five residual streams and a layer nine times (dense, three stages, the best so far,
        gradients, two moments of AdamW, and as it is read), beside the embeddings; `self` has the dense model before,
        as has the assignment by activity.
        """
        copying = max(info.nbytes for info in self.dense.tensors.values()) + max(
            entry.nbytes for shard in self.shards for entry in shard.entries
        )
        if not self.options.calibrates:
            measured = self.options.assignment == "activity"
            return max(copying, self.dense.nbytes if measured else 0)
        shapes = dense_shapes(self.dense_config)
        layer = sum(torch.Size(shape).numel() for name, shape in shapes.items() if ".layers.0." in name)
        embeddings = torch.Size(shapes["model.embed_tokens.weight"]).numel()
        streams = 5 * self.options.calibration_tokens * self.config.hidden_size
        sampling = 4 * self.dense_parameters if self.options.calibrate == "self" else 0  # in float32 on a CPU
        return max(4 * (streams + 9 * layer + embeddings), sampling, copying)

    def text(self) -> str:
        """The plan for a person to read: every mapping, layers that are alike in one line."""
        o, c = self.options, self.config
        padding = f", {self.padded_neurons} of them zero padding" if self.padded_neurons else ""
        growth = self.finedeep_parameters / self.dense_parameters - 1
        calibrated = (
            f"; calibrated on {o.calibration_tokens:,} tokens ({o.calibrate}), {o.calibration_steps} steps a layer"
            if o.calibrates
            else ""
        )
        lines = [
            f"{self.dense.folder}: {self.dense_config.model_type}, {c.num_hidden_layers} layers, hidden size "
            f"{c.hidden_size}, FFN width {self.dense_config.intermediate_size}",
            f"M={o.num_expert_sublayers} sub-layers of K={o.num_experts_per_sublayer} experts of "
            f"{c.expert_intermediate_size} neurons: FFN width {c.intermediate_size}{padding}",
            f"mode {o.mode}: {MODES[o.mode]}; assignment {o.assignment}, seed {o.seed}, dtype {o.dtype}{calibrated}",
            "",
            *self._mapping_lines(),
            "",
            f"parameters  {self.dense_parameters:,} -> {self.finedeep_parameters:,} ({growth:+.2%})",
            f"disk        {size(self.nbytes)} in {len(self.shards)} file{'s' * (len(self.shards) > 1)}",
            f"memory      {size(self.memory)} of weights and activations at a time",
            f"logits      {'equal to the dense model' if self.exact else 'not equal to the dense model: M >= 2'}",
        ]
        return "\n".join([*lines, *([f"warning     {self.much_padding}"] if self.much_padding else [])])

    def _mapping_lines(self) -> list[str]:
        layers: dict[tuple[str, str], list[int]] = defaultdict(list)
        dtypes = {entry.name: entry.dtype for shard in self.shards for entry in shard.entries}
        for target in self.targets:
            source = "" if target.part in ("zeros", "random") else f" <- {target.piece.stored}"
            shape = "x".join(map(str, target.shape))
            part = target.part if target.part != "neurons" else f"neurons along dimension {target.dim}"
            if target.piece.start or (source and target.part == "whole" and target.shape[0] != target.piece.rows):
                part += f", rows from {target.piece.start}"
            line = f"{target.name} [{shape} {str(dtypes[target.name]).removeprefix('torch.')}]{source} ({part})"
            layers[re.sub(r"\.layers\.\d+\.", ".layers.*.", line), ""].append(target.layer)
        return [
            line.replace(".layers.*.", f".layers.{{{min(found)}..{max(found)}}}.") if len(found) > 1 else line
            for (line, _), found in layers.items()
        ]


def make_plan(dense: DenseCheckpoint, options: Options) -> Plan:
    """Decide everything.

    Raises:
        ConversionError: the checkpoint cannot be converted, or not as asked.
    """
    check_options(options)
    family_name, dense_config, shapes = _read_config(dense)
    family = FAMILIES[family_name]
    options = with_calibration_size(options, dense_config)
    check_tensors(dense, dense_config, shapes)
    try:
        config = finedeep_config(dense_config, family, options)
        check_numbers(config)
        found = targets(family, dense_config, config, options.mode)
    except ConversionError:
        raise
    except Exception as error:  # as above: the fields are a stranger's
        raise ConversionError(one_line(error)) from error
    entries = [
        Entry(target.name, target.shape, CAST[options.dtype] or dense.tensors[target.piece.stored].dtype)
        for target in found
    ]
    config.dtype = CAST[options.dtype] or dense.dtype
    return Plan(dense, dense_config, config, options, found, plan_shards(entries, parse_size(options.max_shard_size)))


def finedeep_config(dense: PretrainedConfig, family: Family, options: Options) -> FinedeepConfig:
    """The configuration of what a dense model of a family becomes. Raises what `FinedeepConfig` raises."""
    sublayers = options.num_expert_sublayers
    holding_neurons = (1 if options.mode == "grow" else sublayers) * options.num_experts_per_sublayer
    per_expert = -(-dense.intermediate_size // holding_neurons)
    return FinedeepConfig(
        **_inherited(dense.to_dict(), family),
        architectures=["FinedeepForCausalLM"],
        intermediate_size=per_expert * sublayers * options.num_experts_per_sublayer,
        num_expert_sublayers=sublayers,
        num_experts_per_sublayer=options.num_experts_per_sublayer,
        routing_input=options.routing_input,
        routing_function=options.routing_function,
    )


def with_calibration_size(options: Options, dense: PretrainedConfig) -> Options:
    """The options, with tokens and steps of a calibration by the model's size where none are given."""
    if not options.calibrates:
        return options
    channels = max(dense.hidden_size, dense.intermediate_size // options.num_expert_sublayers)
    tokens, steps = options.calibration_tokens, options.calibration_steps
    return dataclasses.replace(
        options,
        calibration_tokens=max(LEAST_TOKENS, TOKENS_PER_NEURON * channels) if tokens is None else tokens,
        calibration_steps=STEPS if steps is None else steps,
    )


def _inherited(fields: Mapping[str, Any], family: Family) -> dict[str, Any]:
    known = (set(LlamaConfig().to_dict()) | ROPE_FIELDS | set(family.reads)) - NOT_INHERITED
    found = {key: value for key, value in fields.items() if key in known}
    found |= {ours: fields[theirs] for ours, theirs in family.renamed.items()}
    return found | dict(family.always)


def _read_config(dense: DenseCheckpoint) -> tuple[str, PretrainedConfig, dict[str, tuple[int, ...]]]:
    """The family's name, its configuration, and the tensors that a model of it has."""
    path = dense.folder / "config.json"
    model_type = dense.config["model_type"]
    if dense.config.get("quantization_config"):
        raise ConversionError(f"{path} has a quantization_config; convert the unquantised checkpoint.")
    check_layers(dense, dense.config, path)
    try:
        config = family_config(model_type, harmless(dense.config))
        shapes = dense_shapes(config)
        pieces(FAMILIES[model_type], config, shapes)
    except ConversionError:
        raise
    except Exception as error:  # the file is a stranger's, and what a bad one raises differs by version
        raise ConversionError(f"{path} is not a {model_type} configuration that works: {one_line(error)}") from error
    rope = getattr(config, "rope_parameters", None) or dense.config
    if rope.get("partial_rotary_factor", 1.0) not in (1.0, None):
        raise ConversionError(
            f"{path} has partial_rotary_factor {rope['partial_rotary_factor']}; heads that RoPE rotates in part only "
            "cannot be converted."
        )
    return model_type, config, shapes


def harmless(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a stranger's configuration without those of which transformers makes whatever they say."""
    return {key: value for key, value in fields.items() if key not in NOT_INHERITED - {"intermediate_size"}}


def options_from(fields: Mapping[str, Any]) -> Options:
    """Options from a receipt. Raises `ConversionError` for a field that there is not."""
    known = {field.name for field in dataclasses.fields(Options)}
    if set(fields) - known:
        raise ConversionError(f"options {some(set(fields) - known)} are not known; known are: {', '.join(known)}.")
    return Options(**fields)


def same_plan(plan: Plan) -> dict[str, Any]:
    """What has to be the same for a stopped run to be resumed, as JSON."""
    sources = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in plan.dense.files}
    layout = [[shard.file_name, shard.nbytes, len(shard.entries)] for shard in plan.shards]
    texts = {"calibration text": plan.options.calibrate if plan.options.calibrates else None}
    texts["assignment text"] = plan.options.text
    return {
        "source": str(Path(plan.dense.folder).resolve()),
        "source files": sources,
        "options": dataclasses.asdict(plan.options),
        "config": plan.config.to_json_string(),
        "shards": layout,
        **{use: sha256(Path(text)) if text and Path(text).is_file() else text for use, text in texts.items()},
    }
