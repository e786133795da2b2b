"""Which neuron of the dense FFN goes to which expert.

An assignment is an order of the neurons: cut into M * K groups of (nearly) the same size, one for each expert, the
first K of them for the first sub-layer. `ASSIGNMENTS` names the orders that there are; `register_assignment` adds
one, and `package:function` names one that lies elsewhere.
With M = 1 each of them gives the dense logits.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from finedeep_files.errors import ConversionError, one_line

PADDING = -1


@dataclass(frozen=True)
class Layer:
    """What an assignment may know of one decoder layer."""

    index: int
    width: int  # neurons of the dense FFN
    num_sublayers: int
    num_experts: int
    generator: torch.Generator  # seeded by the conversion's seed and the layer
    gate: Callable[[], torch.Tensor]  # reads W_gate (width, hidden)
    activity: Callable[[], torch.Tensor]  # measures mean |activation| of each neuron (width,) on the user's text
    nonlinearity: Callable[[], torch.Tensor]  # measures how far each neuron (width,) is from a linear map of its input

    @property
    def groups(self) -> int:
        """M * K, the experts in all."""
        return self.num_sublayers * self.num_experts


def layer_generator(seed: int, layer: int) -> torch.Generator:
    """The generator with which a conversion's seed shuffles a layer; export makes it again."""
    return torch.Generator().manual_seed((seed * 1_000_003 + layer) % 2**64)


Order = Callable[[Layer], torch.Tensor]
ASSIGNMENTS: dict[str, Order] = {}
# The assignments that depend on nothing but the sizes and the seed.
FORMULAS = ("contiguous", "strided", "random")


def register_assignment(name: str) -> Callable[[Order], Order]:
    """Make a function known under `name`, to `convert_checkpoint(..., assignment=name)`.

    It is given a `Layer` and returns the numbers of its neurons, each once, in the order in which they are dealt out.
    """

    def register(order: Order) -> Order:
        ASSIGNMENTS[name] = order
        return order

    return register


@register_assignment("contiguous")
def contiguous(layer: Layer) -> torch.Tensor:
    """Neurons in their own order."""
    return torch.arange(layer.width)


@register_assignment("strided")
def strided(layer: Layer) -> torch.Tensor:
    """Neuron i goes to expert i mod M*K."""
    return torch.cat([torch.arange(first, layer.width, layer.groups) for first in range(layer.groups)])


@register_assignment("random")
def random(layer: Layer) -> torch.Tensor:
    """Neurons shuffled."""
    return torch.randperm(layer.width, generator=layer.generator)


@register_assignment("activity")
def activity(layer: Layer) -> torch.Tensor:
    """The most active neurons first, by their mean |activation| on a text: sub-layer 1 has the most active."""
    return torch.argsort(layer.activity(), descending=True, stable=True)


@register_assignment("nonlinearity")
def nonlinearity(layer: Layer) -> torch.Tensor:
    """The least linear neurons first. Sub-layer 1 reads what it was trained on; later ones need a linear correction."""
    return torch.argsort(layer.nonlinearity(), descending=True, stable=True)


@register_assignment("clusters")
def clusters(layer: Layer) -> torch.Tensor:
    """Neurons with gate vectors of one direction together: k-means on the sphere with clusters of equal size."""
    return balanced_clusters(layer.gate(), layer.groups, layer.generator)


def balanced_clusters(vectors: torch.Tensor, groups: int, generator: torch.Generator, rounds: int = 10) -> torch.Tensor:
    """Order of the rows, cluster after cluster. Args: vectors (width, hidden). Returns (width,)."""
    x = torch.nn.functional.normalize(vectors.float(), dim=1)
    sizes = torch.tensor([len(part) for part in torch.tensor_split(torch.arange(len(x)), groups)])
    centres = x[torch.randperm(len(x), generator=generator)[:groups]]
    for _ in range(rounds):
        likeness = x @ centres.T
        home = _fill(likeness, sizes)
        centres = torch.nn.functional.normalize(torch.zeros_like(centres).index_add_(0, home, x), dim=1)
    return torch.argsort(home, stable=True)


def _fill(likeness: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Give each row a column of its own liking, the keenest rows first, as long as there is room. Returns (rows,)."""
    room = sizes.tolist()
    best, second = likeness.topk(min(2, likeness.shape[1]), dim=1).values[:, [0, -1]].T
    wishes = likeness.argsort(dim=1, descending=True, stable=True).tolist()
    home = [0] * len(wishes)
    for row in (best - second).argsort(descending=True, stable=True).tolist():
        column = next(column for column in wishes[row] if room[column])
        room[column] -= 1
        home[row] = column
    return torch.tensor(home)


def order_named(name: str) -> Order:
    """The function of a name in `ASSIGNMENTS`, or of `package:function`, which is imported.

    Raises:
        ConversionError: there is none.
    """
    if name in ASSIGNMENTS:
        return ASSIGNMENTS[name]
    module, colon, function = str(name).partition(":")
    if not colon:
        raise ConversionError(
            f"assignment {name!r} is not known; known are: {', '.join(ASSIGNMENTS)}, or a function of yours as "
            "package:function."
        )
    try:
        order = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever the module raises
        raise ConversionError(
            f"assignment {name!r} cannot be imported ({one_line(error)}); name an importable package:function."
        ) from error
    if not callable(order):
        raise ConversionError(f"assignment {name!r} is a {type(order).__name__}; name a function.")
    return order


def assign(name: str, layer: Layer) -> torch.Tensor:
    """(M, K, e) neuron numbers, with e the smallest width that fits; `PADDING` where there is none.

    Where M * K does not divide the width, some experts end with one padding neuron, which puts out nothing (see
    `gather`): the function stays the same.

    Raises:
        ConversionError: the name is not known, or its order is not one of all neurons.
    """
    order = torch.as_tensor(order_named(name)(layer)).cpu()
    if not torch.equal(order.sort().values, torch.arange(layer.width)):
        raise ConversionError(
            f"assignment {name!r} gave layer {layer.index} an order in which not each of the {layer.width} neurons "
            "stands once."
        )
    return deal(order, layer.num_sublayers, layer.num_experts)


def deal(order: torch.Tensor, num_sublayers: int, num_experts: int) -> torch.Tensor:
    """Cut an order (width,) into (M, K, e)."""
    groups = torch.tensor_split(order, num_sublayers * num_experts)
    padded = torch.nn.utils.rnn.pad_sequence(groups, batch_first=True, padding_value=PADDING)
    return padded.view(num_sublayers, num_experts, -1)


def gather(tensor: torch.Tensor, dim: int, neurons: torch.Tensor) -> torch.Tensor:
    """Pick `neurons` (any shape, flattened) of `tensor` along `dim`.

    `PADDING` has zeros in W_down (dim 1), so that it puts out nothing. What leads into it (dim 0) is neuron 0's: DoRA
    divides by the norms of rows, which must not be 0.
    """
    wanted = neurons.flatten()
    first, size = int(wanted[0]), wanted.numel()
    if first >= 0 and torch.equal(wanted, torch.arange(first, first + size)):
        return tensor.narrow(dim, first, size).contiguous()  # in one go: several times as fast
    picked = tensor.index_select(dim, wanted.clamp(min=0))
    if dim == 0:
        return picked
    return picked.index_fill_(dim, (wanted == PADDING).nonzero().flatten(), 0)
