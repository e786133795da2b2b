"""Run by `accelerate launch`: `finedeep heal` with the model shared out by FSDP2. Arguments: those of the command."""

import sys

import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from finedeep_cli import main
from torch.distributed.tensor import DTensor
from transformers import Trainer


def create_with_fsdp2(trainer):
    """As accelerated.py: asked for on a CPU, accelerate silently falls back to DDP."""
    create(trainer)
    plugin = FullyShardedDataParallelPlugin(cpu_ram_efficient_loading=False)  # which wants an accelerator
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    trainer.is_fsdp_enabled = True


def training_step(trainer, model, *arguments, **options):
    seen.append(all(isinstance(parameter, DTensor) for parameter in model.parameters()))
    return step(trainer, model, *arguments, **options)


create, step, seen = Trainer.create_accelerator_and_postprocess, Trainer.training_step, []
Trainer.create_accelerator_and_postprocess, Trainer.training_step = create_with_fsdp2, training_step
code = main(sys.argv[1:])
assert seen[-1], seen
torch.distributed.destroy_process_group()
sys.exit(code)
