"""The tensors of a Finedeep checkpoint, made from the dense ones: a layer at a time, a few rows at a time."""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import torch
from finedeep_files.errors import ConversionError

from .assignment import PADDING, gather
from .plan import CAST, Plan
from .tensor_mapping import Target

BLOCK = 2**22  # values of a weight that are worked on at a time


def layer_tensors(plan: Plan, layer: int, neurons: torch.Tensor) -> dict[str, torch.Tensor]:
    """All tensors of one decoder layer, by name; `neurons` (M, K, e) as `assign` gives them."""
    wanted = [target for target in plan.targets if target.layer == layer]
    return {target.name: torch.cat(list(blocks)) for target, blocks in made(plan, wanted, {layer: neurons})}


def padding_rows(tensors: Mapping[str, torch.Tensor], neurons: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of each tensor of a layer that leads into neurons, whose names are given, which rows are padding's."""
    found = {}
    for name in tensors:
        if name.split(".")[-2] in ("gate_proj", "up_proj"):
            m = int(name.partition(".sublayers.")[2].partition(".")[0])
            found[name] = (neurons[m].flatten() == PADDING).nonzero().flatten()
    return found


def made(
    plan: Plan,
    wanted: Sequence[Target],
    neurons: Mapping[int, torch.Tensor] | Sequence[torch.Tensor],
    ready: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> Iterator[tuple[Target, Iterator[torch.Tensor]]]:
    """The tensors of one layer, each a few rows at a time.

    Tensors that are `ready` are handed on as they are.
    """
    stored_name, stored = None, torch.empty(0)
    dtype = CAST[plan.options.dtype]
    for target in wanted:
        if target.name in ready:
            yield target, iter(_split(ready[target.name]))
            continue
        if target.part in ("zeros", "random"):
            yield target, iter([_new(target, dtype or plan.dense.tensors[target.piece.stored].dtype, plan)])
            continue
        if target.piece.stored != stored_name:
            stored_name, stored = target.piece.stored, plan.dense.load(target.piece.stored)
        tensor = stored.narrow(0, target.piece.start, target.piece.rows)
        blocks = _blocks(tensor, target, neurons, plan)
        if dtype is not None and tensor.dtype != dtype:
            blocks = (cast(target.piece.stored, rows, dtype) for rows in blocks)
        yield target, blocks


def _split(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Blocks of rows, so that memory does not grow with the tensor and what is made is written meanwhile."""
    return tensor.split(_rows_in_a_block(tensor))


def _rows_in_a_block(tensor: torch.Tensor) -> int:
    return max(1, BLOCK * len(tensor) // tensor.numel())


def _blocks(
    tensor: torch.Tensor, target: Target, neurons: Mapping[int, torch.Tensor], plan: Plan
) -> Iterator[torch.Tensor]:
    if target.part == "share":
        grown = plan.options.mode == "grow"
        experts = plan.options.num_experts_per_sublayer * (1 if grown else plan.options.num_expert_sublayers)
        yield (tensor / experts).expand(target.shape)
    elif target.part == "whole":
        yield from _split(tensor)
    elif target.dim == 0:
        order = neurons[target.layer][target.m].flatten()
        yield from (gather(tensor, 0, part) for part in order.split(_rows_in_a_block(tensor)))
    else:
        yield from (gather(rows, 1, neurons[target.layer][target.m]) for rows in _split(tensor))


def _new(target: Target, dtype: torch.dtype, plan: Plan) -> torch.Tensor:
    """A tensor that no dense tensor is the source of."""
    if target.part == "zeros":
        return torch.zeros(target.shape, dtype=dtype)
    place = f"{plan.options.seed} {target.name}"
    generator = torch.Generator().manual_seed(zlib.crc32(place.encode()))
    return torch.empty(target.shape).normal_(std=plan.config.initializer_range, generator=generator).to(dtype)


def cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    cast = tensor.to(dtype)
    if not torch.isfinite(torch.stack(cast.aminmax())).all():
        raise ConversionError(
            f"tensor {name} has values up to {tensor.abs().max().item():.3g}, too large for {dtype}; keep its dtype or "
            "choose bfloat16."
        )
    return cast
