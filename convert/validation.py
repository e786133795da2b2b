"""What must be right before a conversion begins: the options, the configuration, and the tensors that it asks for."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from finedeep_files.conversion_options import Options
from finedeep_files.errors import ConversionError, check_seed
from finedeep_files.options import check_fields
from finedeep_files.sizes import parse_size
from transformers import PretrainedConfig

from ..configuration_finedeep import FinedeepConfig
from .assignment import FORMULAS, order_named
from .source import DenseCheckpoint
from .tensor_mapping import RECOMPUTED, some

BASE = "model."
# The last part of a name before ".weight" or ".bias" -> what kind of model has it.
HEADS = {
    "score": "a classifier or a reward model",
    "classifier": "a classifier",
    "qa_outputs": "a model for question answering",
    "v_head": "a policy with a value head",
    "value_head": "a policy with a value head",
}


def check_kind(dense: DenseCheckpoint, wanted: Iterable[str]) -> None:
    """Raise `ConversionError` for a base model without its prefix, and for a model with another head.

    Args:
        dense: the checkpoint.
        wanted: the names of a causal language model's tensors.
    """
    wanted, found = set(wanted), set(dense.tensors)
    for name in sorted(found - wanted):
        parts = set(name.split(".")[:-1])
        if kind := next((HEADS[part] for part in HEADS if part in parts), None):
            raise ConversionError(
                f"{dense.folder} holds {name}: it is {kind}. A causal language model can be converted; take the one "
                "that this was made from."
            )
    without = found & {name.removeprefix(BASE) for name in wanted if name.startswith(BASE)}
    if without and not any(name.startswith(BASE) for name in found):
        raise ConversionError(
            f"{dense.folder} holds tensors without the prefix {BASE!r} ({min(without)}): it was saved from the base "
            "model alone, without its head. Load it with AutoModelForCausalLM in transformers and save it again; where "
            "embeddings are not tied, lm_head.weight has to come from the full checkpoint."
        )


def check_options(o: Options) -> None:
    """Raise `ConversionError` for an option that cannot be met."""
    check_fields(o)
    order_named(o.assignment)
    if o.assignment == "activity" and o.text is None and not o.calibrates:
        raise ConversionError("assignment 'activity' measures on a text; name one (--assignment-text, or text=).")
    if o.assignment == "nonlinearity" and not o.calibrates:
        raise ConversionError("assignment 'nonlinearity' is measured in calibration; add --calibrate (calibrate=).")
    if o.mode == "grow" and o.num_expert_sublayers == 1:
        raise ConversionError(
            "mode 'grow' adds sub-layers to the one of the dense FFN; ask for two or more (--sublayers 2, "
            "num_expert_sublayers=2), or leave it out."
        )
    if o.calibrate is None and not (o.calibration_tokens is None and o.calibration_steps is None):
        raise ConversionError(
            "calibration_tokens and calibration_steps are for a calibration; add --calibrate (calibrate=) or leave "
            "them out."
        )
    if o.text is not None and (o.calibrates or o.assignment in (*FORMULAS, "clusters")):
        why = "calibration's own text is what is measured on" if o.calibrates else f"{o.assignment!r} measures nothing"
        raise ConversionError(
            f"a text for the assignment is given (--assignment-text, text=), and {why}; leave it out, or ask for "
            "another assignment (--assignment activity)."
        )
    check_seed(o.seed)
    parse_size(o.max_shard_size)


def check_layers(held: DenseCheckpoint, fields: Mapping[str, Any], path: Path) -> None:
    """Raise `ConversionError` for a configuration of more layers than there can be, before anything is made of it."""
    layers = fields.get("num_hidden_layers")
    if layers is not None and not (isinstance(layers, int) and 0 < layers <= len(held.tensors)):
        raise ConversionError(
            f"{path} has num_hidden_layers {layers!r}; the checkpoint holds {len(held.tensors)} tensors, and each "
            "layer has several. Checkpoint and config do not belong together."
        )


def check_numbers(config: FinedeepConfig) -> None:
    """What some versions of transformers take as it comes, and fail on much later."""
    for field in ("rms_norm_eps", "initializer_range", "attention_dropout", "max_position_embeddings"):
        value = getattr(config, field)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConversionError(f"config.json has {field}={value!r}; it must be a number.")


def check_tensors(dense: DenseCheckpoint, config: PretrainedConfig, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Every tensor that the config asks for is there with its shape, and no other."""
    check_kind(dense, wanted)
    missing = [name for name in wanted if name not in dense.tensors]
    if missing:
        raise ConversionError(f"{dense.folder} lacks {some(missing)}, which its config.json asks for.")
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
        are_biases = all(name.endswith(".bias") for name in unknown)
        biases = " attention_bias or mlp_bias is missing from the config." if are_biases else ""
        raise ConversionError(
            f"{dense.folder} holds {some(unknown)}, which a {config.model_type} model with its config.json does not "
            f"have.{biases}"
        )
