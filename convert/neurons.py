"""Which neuron of the dense FFN goes to which expert."""

import torch

PADDING = -1


def contiguous(width: int, num_sublayers: int, num_experts: int) -> torch.Tensor:
    """Neurons in their own order, shared as equally as they can be.

    Returns:
        (M, K, e) neuron numbers, with e the smallest width that fits. Where M * K does not divide `width`, some
        experts end with one `PADDING` neuron, whose weights are zero: the function stays the same.
    """
    groups = torch.tensor_split(torch.arange(width), num_sublayers * num_experts)
    padded = torch.nn.utils.rnn.pad_sequence(groups, batch_first=True, padding_value=PADDING)
    return padded.view(num_sublayers, num_experts, -1)


def gather(tensor: torch.Tensor, dim: int, neurons: torch.Tensor) -> torch.Tensor:
    """Pick `neurons` (any shape, flattened) of `tensor` along `dim`; `PADDING` gives zeros."""
    wanted = neurons.flatten()
    picked = tensor.index_select(dim, wanted.clamp(min=0))
    padding = (wanted == PADDING).nonzero().flatten()
    return picked.index_fill_(dim, padding, 0)
