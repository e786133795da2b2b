"""Turn a Finedeep model that is a dense model in disguise back into the dense model."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from finedeep_files.conversion_options import ExportOptions, Options
from finedeep_files.errors import ConversionError, one_line
from finedeep_files.json_files import write_json
from finedeep_files.options import takes_options
from finedeep_files.shards import INDEX, Entry, FolderWriter, Shard, plan_shards, write_index
from finedeep_files.sizes import parse_size
from finedeep_files.working_folder import Contents, WorkingFolder
from tqdm import tqdm
from transformers import PretrainedConfig

from ..configuration_finedeep import ROUTING_FUNCTIONS, FinedeepConfig
from .assignment import FORMULAS, PADDING, Layer, assign, layer_generator
from .families import FAMILIES
from .plan import NOT_INHERITED, ROPE_FIELDS, finedeep_config, harmless, options_from
from .receipt import NEURONS, RECEIPT, read_neuron_table, read_receipt
from .source import COMPANIONS, DenseCheckpoint, check_finedeep, copy_companion, open_checkpoint
from .tensor_mapping import SUBLAYER, dense_shapes, family_config, pieces, some, targets
from .validation import check_layers, check_tensors

# What a Llama's configuration cannot say, and the value that it would have to have.
BEYOND_LLAMA: dict[str, Any] = {
    "qk_norm": False,
    "sliding_window": None,
    "no_rope_layers": None,
    "attention_multiplier": None,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}
# What the function depends on: in the folder's configuration it has to be what the receipt's dense model has.
DECISIVE = (
    *BEYOND_LLAMA,
    *("attention_bias", "attention_output_bias", "mlp_bias", "layer_types", "tie_word_embeddings"),
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("num_experts_per_sublayer", "head_dim", "hidden_act", "rms_norm_eps", "vocab_size", "max_position_embeddings"),
    *("rope_theta", "rope_scaling", "rope_parameters"),
)
# What may have been changed since, and comes along.
CHANGEABLE = ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache")
MODULES = {dense: ours for ours, (dense, _, _) in SUBLAYER.items() if ours != "router"}


@takes_options(ExportOptions)
def export_checkpoint(source: str | Path, destination: str | Path, *, progress: bool = True, **options: Any) -> Path:
    """Write the dense model that a Finedeep model with M = 1 and constant gates is.

    With the receipt of its conversion in the folder, neurons go back to where they were, padding is taken off, and the
    configuration is the dense one: the tensors equal the ones that were converted. Padding that has learnt something
    since, by an adapter, say, stays: the dense FFN is then as wide as the experts together. Without the receipt, a
    Llama is written, of the same function, with neurons in the order of the experts.

    Args:
        source: the Finedeep folder, or a Hub id.
        destination: the folder to make. It must not exist, or be empty.
        progress: whether to show a progress bar on stderr.
        options: the fields of `ExportOptions`: `max_shard_size`, the largest weight file.

    Raises:
        ConversionError: the model is no dense model: M >= 2, routers that are not zero, gates other than 1, a norm on
            the sub-layers' output, or, without a receipt, attention that Llama does not have; or the receipt is of
            another model.
    """
    work = WorkingFolder(Path(destination), ConversionError)
    work.check()
    held = open_checkpoint(source, check=check_finedeep)
    form = _dense_form(held, _finedeep_config(held))
    _check_routers(held)
    neurons = form.orders
    if neurons is not None and not _padding_is_silent(held, neurons):
        wide, width = form.experts_width, form.config.intermediate_size
        warnings.warn(
            f"{held.folder}: its padding neurons have learnt something, and stay: intermediate_size is {wide}, not "
            f"{width} as in the model that it was made of.",
            stacklevel=2,
        )
        neurons = [_padding_last(order, width) for order in neurons]
        form.config.intermediate_size = form.fields["intermediate_size"] = wide
    parts = _parts(form)
    shapes = dense_shapes(form.config)
    entries = [Entry(name, shapes[name], held.tensors[_ours(parts[name][0])].dtype) for name in shapes]
    shards = plan_shards(entries, parse_size(ExportOptions(**options).max_shard_size))
    nbytes = sum(shard.nbytes for shard in shards)
    work.check_room(nbytes)
    plan = {"source": str(held.folder.resolve()), "shards": [[shard.file_name, shard.nbytes] for shard in shards]}
    bar = tqdm(total=nbytes, desc="Exporting", unit="B", unit_scale=True, disable=None if progress else True)
    contents = Contents("export", (*(shard.file_name for shard in shards), INDEX, "config.json", *COMPANIONS))
    with work.begun(contents, plan) as folder, bar:
        with FolderWriter(folder, shards) as writer:
            for entry in (entry for shard in shards for entry in shard.entries):
                rows = [_dense_tensor(held, name, neurons) for name in parts[entry.name]]
                writer.write(entry.name, torch.cat(rows) if len(rows) > 1 else rows[0])
                bar.update(entry.nbytes)
        _write_beside(folder, held, form, shards)
    return work.destination


@dataclass(frozen=True)
class _DenseForm:
    """The dense model that a Finedeep model is.

    `fields` are those of its config.json, `orders` has for each layer the dense neuron of each of the model's, where a
    receipt says which, and `experts_width` is the number of neurons with padding.
    """

    family_name: str
    fields: dict[str, Any]
    config: PretrainedConfig
    orders: list[torch.Tensor] | None
    experts_width: int


def _dense_form(held: DenseCheckpoint, config: FinedeepConfig) -> _DenseForm:
    """By the receipt, where there is one. Raises `ConversionError` where tensors or receipt are another model's."""
    receipt = read_receipt(held.folder) if (held.folder / RECEIPT).is_file() else None
    family_name, fields, options = _family_and_fields(held, config, receipt)
    try:
        dense_config = family_config(family_name, harmless(fields))
        found = targets(FAMILIES[family_name], dense_config, config, mode="split")
    except ConversionError:
        raise
    except Exception as error:  # the fields are a stranger's
        raise ConversionError(f"{held.folder} has no configuration that works: {one_line(error)}") from error
    check_tensors(held, config, {target.name: target.shape for target in found})
    try:
        orders = _orders(held, config, options, dense_config.intermediate_size) if options is not None else None
    except ConversionError:
        raise
    except Exception as error:
        raise _no_receipt(held, error) from error
    return _DenseForm(family_name, fields, dense_config, orders, config.intermediate_size)


def _parts(form: _DenseForm) -> dict[str, list[str]]:
    """Name of each stored dense tensor -> Llama's names of what is in it, from the first row on."""
    parts: dict[str, list[tuple[int, str]]] = {}
    for name, piece in pieces(FAMILIES[form.family_name], form.config, dense_shapes(form.config)).items():
        parts.setdefault(piece.stored, []).append((piece.start, name))
    return {stored: [name for _, name in sorted(found)] for stored, found in parts.items()}


def _write_beside(folder: Path, held: DenseCheckpoint, form: _DenseForm, shards: list[Shard]) -> None:
    """All that lies beside the weights."""
    write_index(folder, shards)
    fields = form.fields
    fields["torch_dtype" if "torch_dtype" in fields else "dtype"] = str(held.dtype).removeprefix("torch.")
    content = {"architectures": [_architecture(form.family_name)], "model_type": form.family_name, **fields}
    write_json(folder / "config.json", content)
    for file in held.companions():
        copy_companion(file, held.folder, folder)


def _architecture(family_name: str) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family_name]


def _finedeep_config(held: DenseCheckpoint) -> FinedeepConfig:
    path = held.folder / "config.json"
    check_layers(held, held.config, path)
    if held.config.get("quantization_config") is not None:
        raise ConversionError(f"{path} has a quantization_config; export the unquantised model.")
    try:
        config = FinedeepConfig(**harmless(held.config))
    except Exception as error:
        raise ConversionError(f"{path} is not a Finedeep configuration that works: {one_line(error)}") from error
    neutral = ROUTING_FUNCTIONS[config.routing_function].neutral_scale(config.num_experts_per_sublayer)
    wanted = {"num_expert_sublayers": 1, "sublayer_output_norm": False, "routed_scaling_factor": neutral}
    for field, value in wanted.items():
        if getattr(config, field) != value:
            raise ConversionError(
                f"{path} has {field}={getattr(config, field)!r}; only with {value!r} is the model a dense one, and "
                "nothing else can be exported."
            )
    return config


def _check_routers(held: DenseCheckpoint) -> None:
    moved = [name for name in held.tensors if name.endswith(".router") and held.load(name).any()]
    if moved:
        raise ConversionError(
            f"{held.folder} has routers that are not zero ({some(moved)}): its gates depend on the token, and no dense "
            "FFN is that function."
        )


def _family_and_fields(
    held: DenseCheckpoint, config: FinedeepConfig, receipt: Mapping[str, Any] | None
) -> tuple[str, dict[str, Any], Options | None]:
    """The family, its configuration's fields, and, where there is a receipt, the options of the conversion."""
    if receipt is not None:
        try:
            options, fields = options_from(receipt["options"]), dict(receipt["source"]["config"])
            family_name = receipt["source"]["model_type"]
            fields = {k: v for k, v in fields.items() if k not in ("architectures", "model_type")}
            if family_name not in FAMILIES:
                raise ConversionError(f"{held.folder / RECEIPT} names the family {family_name!r}, which is not known.")
            check_layers(held, fields, held.folder / RECEIPT)
            dense_config = family_config(family_name, harmless(fields))
            _check_same(held, config, finedeep_config(dense_config, FAMILIES[family_name], options))
            now, before = config.to_dict(), dense_config.to_dict()
        except ConversionError:
            raise
        except Exception as error:  # the file may be a stranger's, and what a bad one raises differs by version
            raise _no_receipt(held, error) from error
        fields |= {field: now[field] for field in CHANGEABLE if now.get(field) != before.get(field)}
        return family_name, fields, options
    for field, value in BEYOND_LLAMA.items():
        if getattr(config, field) != value:
            raise ConversionError(
                f"{held.folder} has {field}={getattr(config, field)!r}, which a Llama does not have, and no {RECEIPT} "
                "that says which family it is of."
            )
    if config.attention_output_bias != config.attention_bias:
        raise ConversionError(f"{held.folder} has biases on queries, keys and values only, and no {RECEIPT}.")
    llama = family_config("llama", {})
    known = (set(llama.to_dict()) | ROPE_FIELDS) - NOT_INHERITED | {"intermediate_size", "dtype"}
    return "llama", {key: value for key, value in config.to_dict().items() if key in known}, None


def _check_same(held: DenseCheckpoint, config: FinedeepConfig, expected: FinedeepConfig) -> None:
    """Raise `ConversionError` where the folder's configuration is another one than a conversion gave it."""
    for field in DECISIVE:
        found, wanted = getattr(config, field, None), getattr(expected, field, None)
        if found != wanted:
            raise ConversionError(
                f"{held.folder / 'config.json'} has {field}={found!r}, and what the dense model of its {RECEIPT} was "
                f"made into has {wanted!r}. Put it back, or remove {RECEIPT} to export the model without it."
            )


def _no_receipt(held: DenseCheckpoint, error: Exception) -> ConversionError:
    what = f"lacks {error}" if isinstance(error, KeyError) else f"is no receipt that works ({one_line(error)})"
    return ConversionError(f"{held.folder / RECEIPT} {what}; remove it to export without it.")


def _orders(held: DenseCheckpoint, config: FinedeepConfig, options: Options, width: int) -> list[torch.Tensor]:
    """For each layer the dense neuron of each of the model's."""
    layers, K = config.num_hidden_layers, options.num_experts_per_sublayer
    name = options.assignment
    if name in FORMULAS:
        shuffles = [layer_generator(options.seed, i) for i in range(layers)]
        # A formula reads no weight and measures nothing.
        reads = dict.fromkeys(("gate", "activity", "nonlinearity"))
        made = [assign(name, Layer(i, width, 1, K, shuffles[i], **reads)) for i in range(layers)]
    else:
        path = held.folder / NEURONS
        if not path.is_file():
            raise ConversionError(f"{path} is missing, which says where neurons were; remove {RECEIPT} to do without.")
        made = read_neuron_table(held.folder, layers, width)
    return [neurons.flatten() for neurons in made]


def _padding_is_silent(held: DenseCheckpoint, neurons: list[torch.Tensor]) -> bool:
    """Whether no padding neuron puts anything out, so that the function is the same without them."""
    for layer, order in enumerate(neurons):
        padding = (order == PADDING).nonzero().flatten()
        if not len(padding):
            continue
        ffn = f"model.layers.{layer}.sublayers.0."
        loud = held.load(f"{ffn}down_proj.weight")[:, padding].any(0)
        # Older versions filled up with zeros throughout, of which an adapter of W_down alone makes nothing: act * 0.
        up = [
            held.load(name)[padding] for name in (f"{ffn}up_proj.weight", f"{ffn}up_proj.bias") if name in held.tensors
        ]
        if any((loud & rows.reshape(len(padding), -1).any(1)).any() for rows in up):
            return False
    return True


def _padding_last(order: torch.Tensor, width: int) -> torch.Tensor:
    """The order with numbers for padding neurons too, after the dense ones."""
    numbered = order.clone()
    padding = order == PADDING
    numbered[padding] = width + torch.arange(int(padding.sum()))
    return numbered


def _ours(name: str) -> str:
    """The Finedeep tensor that holds a dense tensor."""
    for dense, ours in MODULES.items():
        if name.endswith(f".{dense}"):
            return f"{name.removesuffix(dense)}sublayers.0.{ours}"
    return name


def _dense_tensor(held: DenseCheckpoint, name: str, neurons: list[torch.Tensor] | None) -> torch.Tensor:
    ours = _ours(name)
    tensor = held.load(ours)
    kind = ours.rpartition("sublayers.0.")[2]
    if ours.endswith("expert_bias"):
        return tensor.sum(0)
    if neurons is None or ours == name or SUBLAYER[kind][1] != "neurons":
        return tensor
    order = neurons[int(name.split(".")[2])]
    real = (order != PADDING).nonzero().flatten()
    return tensor.index_select(SUBLAYER[kind][2], real[order[real].argsort()])
