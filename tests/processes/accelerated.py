"""Run by accelerate launch: three steps of training give the weights that one process gives on the same batches.

Argument: the model's folder. Each process sees one half of every batch.
"""

import sys

import torch
from accelerate import Accelerator
from agreement import agree
from transformers import AutoModelForCausalLM


def steps(model, optimizer, batches, backward):
    for ids in batches:
        optimizer.zero_grad()
        backward(model(input_ids=ids, labels=ids, use_cache=False).loss)
        optimizer.step()


def load(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


accelerator = Accelerator()
assert accelerator.num_processes == 2
batches = [torch.randint(0, 200, (2, 40), generator=torch.Generator().manual_seed(i)) for i in range(3)]
whole, optimizer = load(sys.argv[1])
steps(whole, optimizer, batches, torch.Tensor.backward)
model, optimizer = accelerator.prepare(*load(sys.argv[1]))
mine = accelerator.process_index
steps(model, optimizer, [ids[mine : mine + 1] for ids in batches], accelerator.backward)
found = accelerator.get_state_dict(model)
if accelerator.is_main_process:
    expected = whole.state_dict()
    assert found.keys() == expected.keys()
    for name in expected:
        agree(name, found[name].float(), expected[name], tolerance=1e-4)
accelerator.end_training()
