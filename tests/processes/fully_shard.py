"""Run in two processes: FSDP2 by hand, per decoder layer and per leaf module, gives what one process gives."""

import sys

import torch
from agreement import agree, gradients
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM


def by_layer(model):
    return list(model.model.layers)


def by_leaf(model):
    return [module for module in model.modules() if isinstance(module, torch.nn.Linear)]


def by_leaf_and_layer(model):
    return by_leaf(model) + by_layer(model)


torch.distributed.init_process_group("gloo")
folder = sys.argv[1]
whole = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
ids = torch.arange(2 * 50).reshape(2, 50) % whole.config.vocab_size
for units in (by_layer, by_leaf, by_leaf_and_layer):
    sharded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    for unit in units(sharded):
        fully_shard(unit)
    fully_shard(sharded)
    for tokens in (ids, ids[:1, :3]):
        with torch.no_grad():
            agree(f"{units.__name__} logits", sharded(tokens).logits, whole(tokens).logits)
        sharded.reshard()  # FSDP2 leaves the root whole after a forward without gradients; zero_grad must see its parts
        expected, found = gradients(whole, tokens), gradients(sharded, tokens)
        for name in expected:
            agree(f"{units.__name__} {name}", found[name], expected[name])
torch.distributed.destroy_process_group()
