"""What the processes of a test compare: a sharded model's logits and gradients with those of the whole model."""

import torch


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients(model, ids):
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return {name: full(parameter.grad) for name, parameter in model.named_parameters()}


def agree(name, found, expected, tolerance=1e-5):
    found, expected = full(found), full(expected)
    if found.shape != expected.shape:  # sharded without a tensor that says so: compare this process's part
        rank = torch.distributed.get_rank()
        dim = next(i for i, (f, e) in enumerate(zip(found.shape, expected.shape, strict=True)) if f != e)
        expected = expected.chunk(torch.distributed.get_world_size(), dim)[rank]
    difference = (found - expected).abs().max().item()
    assert difference <= tolerance * max(1.0, expected.abs().max().item()), f"{name}: {difference}"
