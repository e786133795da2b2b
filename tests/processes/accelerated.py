"""Run by `accelerate launch` or torchrun: three steps under accelerate give the weights that one process gives.

Arguments: the model's folder; DDP or FSDP2. Each process sees one half of every batch, the one process all of it.
"""

import sys

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from agreement import agree
from transformers import AutoModelForCausalLM


def accelerate(kind):
    accelerator = Accelerator(cpu=True)
    if kind == "FSDP2":
        # Asked for on a CPU, accelerate silently falls back to DDP; its FSDP2 code itself runs there. What the
        # launch file says has come by environment variables, which the plugin reads.
        plugin = FullyShardedDataParallelPlugin(cpu_ram_efficient_loading=False)  # which wants an accelerator
        assert plugin.fsdp_version == 2
        assert plugin.transformer_cls_names_to_wrap == ["FinedeepDecoderLayer"]
        AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = plugin
    assert accelerator.num_processes == 2
    return accelerator


def steps(model, optimizer, batches, backward):
    for ids in batches:
        optimizer.zero_grad()
        backward(model(input_ids=ids, labels=ids, use_cache=False).loss)
        optimizer.step()


def load(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


folder, kind = sys.argv[1:]
accelerator = accelerate(kind)
batches = [torch.randint(0, 200, (2, 40), generator=torch.Generator().manual_seed(i)) for i in range(3)]
whole, optimizer = load(folder)
steps(whole, optimizer, batches, torch.Tensor.backward)
model, optimizer = accelerator.prepare(*load(folder))
wrapped = type(model.model.layers[0] if kind == "FSDP2" else model).__name__
assert wrapped == {"FSDP2": "FSDPFinedeepDecoderLayer", "DDP": "DistributedDataParallel"}[kind], wrapped
mine = accelerator.process_index
steps(model, optimizer, [ids[mine : mine + 1] for ids in batches], accelerator.backward)
found = {name.removeprefix("module."): tensor for name, tensor in accelerator.get_state_dict(model).items()}
for name, expected in whole.state_dict().items():
    agree(name, found[name], expected, tolerance=1e-4)
torch.distributed.destroy_process_group()
