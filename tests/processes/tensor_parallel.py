"""Run in two processes: folders loaded with tp_plan="auto" give the logits and gradients of one process.

Arguments: `FOLDER=WAY` each, WAY being how the FFN is to be laid out: shared (every process holds a part of it), whole
(every process holds all of it) or refused.
"""

import sys

import pytest
import torch
from agreement import agree, gradients
from transformers import AutoModelForCausalLM


def check(folder, way):
    whole = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    sharded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32, tp_plan="auto")
    ids = torch.arange(2 * 50).reshape(2, 50) % whole.config.vocab_size
    if way == "refused":
        with pytest.raises(NotImplementedError, match="divisible"):
            sharded(ids)
        return
    for tokens in (ids, ids[:1, :3]):
        with torch.no_grad():
            agree("logits", sharded(tokens).logits, whole(tokens).logits)
        expected, found = gradients(whole, tokens), gradients(sharded, tokens)
        for name in expected:
            agree(name, found[name], expected[name])
    held = sharded.model.layers[0].sublayers[0].down_proj.weight
    held = held.to_local() if hasattr(held, "to_local") else held
    parts = torch.distributed.get_world_size() if way == "shared" else 1
    assert held.shape[1] * parts == whole.model.layers[0].sublayers[0].down_proj.in_features


for argument in sys.argv[1:]:
    check(*argument.rsplit("=", 1))
