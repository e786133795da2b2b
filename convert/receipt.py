"""The receipt: what a converted folder was made of, how, and how near it came, with no time, place or secret in it.

The same source, options and versions give the same receipt and the same weights, to the byte.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from finedeep_files.errors import ConversionError
from finedeep_files.hashing import sha256
from finedeep_files.json_files import read_json, write_json
from finedeep_files.masking import masked
from finedeep_files.versions import versions
from finedeep_files.whole_file import write_whole
from huggingface_hub import ModelCard

from .assignment import PADDING
from .plan import Plan
from .source import CARD

RECEIPT = "finedeep_conversion.json"
# No safetensors file: vLLM, for one, takes every one that lies beside the weights for weights.
NEURONS = "finedeep_neurons.json"
LICENCE_FIELDS = ("license", "license_name", "license_link")


def write_receipt(
    folder: Path,
    plan: Plan,
    source: str,
    revision: str | None,
    hashes: dict[str, str],
    calibration: Mapping[str, Any] | None = None,
) -> None:
    """Write `finedeep_conversion.json`.

    Args:
        folder: where the converted model is.
        plan: what was done.
        source: the Hub id, or the source folder's name.
        revision: the commit of a Hub source.
        hashes: SHA-256 of each source file.
        calibration: what `Calibration.record` says.
    """
    text = plan.options.text
    receipt = {
        "source": {
            "id": source,
            "revision": revision,
            "model_type": plan.dense_config.model_type,
            "license": licence_of(plan.dense.folder),
            "sha256": hashes,
            "config": {key: value for key, value in plan.dense.config.items() if key != "auto_map"},
        },
        "options": {name: without_place(value) for name, value in dataclasses.asdict(plan.options).items()},
        "assignment_text": {"name": Path(text).name, "sha256": sha256(Path(text))} if text else None,
        "exact": plan.exact,
        "padded_neurons": plan.padded_neurons,
        "parameters": {"dense": plan.dense_parameters, "finedeep": plan.finedeep_parameters},
        "calibration": calibration,
        "versions": versions(),
    }
    write_json(folder / RECEIPT, masked(receipt))


def licence_of(folder: Path) -> dict[str, str]:
    """What the card of a checkpoint says of its licence: some of license, license_name and license_link."""
    try:
        data = ModelCard.load(folder / CARD, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # no card, or one that is no card: a stranger's file
        return {}
    return {field: data[field] for field in LICENCE_FIELDS if isinstance(data.get(field), str)}


def without_place(value: Any) -> Any:
    """The name alone of what is a path here; a Hub id, a data set's name or anything else as it is."""
    if not isinstance(value, str) or not value:
        return value
    name, colon, rest = value.partition(":")  # NAME:CONFIG:SPLIT, of a data set
    if Path(value).exists():
        return Path(value).absolute().name
    return f"{Path(name).absolute().name}{colon}{rest}" if Path(name).exists() else value


def read_receipt(path: Path) -> dict[str, Any]:
    """A receipt's content; `path` is the file or its folder. Raises `ConversionError` where there is none."""
    path = path / RECEIPT if path.is_dir() else path
    return read_json(path, "a conversion's receipt")


def write_neuron_table(folder: Path, neurons: Sequence[torch.Tensor]) -> None:
    """Write the assignment, (M, K, e) for each layer, so that `finedeep export` can put neurons back."""
    write_whole(folder / NEURONS, json.dumps({"layers": [layer.tolist() for layer in neurons]}))


def read_neuron_table(folder: Path, layers: int, width: int) -> list[torch.Tensor]:
    """What `write_neuron_table` wrote. Raises `ConversionError` unless each layer has each of its neurons once."""
    path = folder / NEURONS
    table = read_json(path, "where the neurons of a converted model were").get("layers")
    try:
        found = [torch.tensor(layer, dtype=torch.long) for layer in table]
        whole = len(found) == layers and all(
            torch.equal(layer[layer != PADDING].sort().values, torch.arange(width)) for layer in found
        )
    except (TypeError, ValueError, RuntimeError):
        whole = False
    if not whole:
        raise ConversionError(
            f"{path} does not have each of {width} neurons once in each of {layers} layers. Get the file again."
        )
    return found
