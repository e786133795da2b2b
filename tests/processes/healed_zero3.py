"""Run by `accelerate launch`: `finedeep heal` under DeepSpeed's ZeRO-3. Arguments: those of the command."""

import sys

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from finedeep_cli import main
from transformers import Trainer


def training_step(trainer, model, *arguments, **options):
    seen.append(all(hasattr(parameter, "ds_id") for parameter in model.parameters()))
    return step(trainer, model, *arguments, **options)


# accelerate uses DeepSpeed where there are accelerators, or where it takes the CPUs of two processes for some.
PartialState._prepare_backend = lambda self, cpu, *given, **named: ("gloo", DistributedType.MULTI_CPU)
step, seen = Trainer.training_step, []
Trainer.training_step = training_step
code = main([*sys.argv[1:], "--set", "use_cpu=false"])
assert seen[-1], seen
torch.distributed.destroy_process_group()
sys.exit(code)
