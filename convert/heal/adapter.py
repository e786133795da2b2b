"""Heal by an adapter (LoRA, arXiv:2106.09685) in the place of the weights, and merge it into them at the end.

AdamW keeps two numbers for each parameter that is trained, and autograd a gradient: 12 bytes in float32. An adapter of
rank r has r * (in + out) parameters for each linear layer, a few per cent of the layer's own.
"""

import torch
from finedeep_files.errors import ConversionError
from transformers import PreTrainedModel, Trainer

ALPHA = 32  # over the rank, what the adapter's product is scaled by; with it the best rate hardly depends on the rank


def with_adapter(student: PreTrainedModel, rank: int, seed: int) -> torch.nn.Module:
    """The student with LoRA of this rank on its linear layers, but for the head, and on its routers; alone trained.

    Raises:
        ConversionError: PEFT is missing.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConversionError("adapter_rank wants PEFT, which trains adapters: pip install 'peft>=0.17'.") from error
    config = LoraConfig(r=rank, lora_alpha=ALPHA, target_modules="all-linear", target_parameters=["router"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # in each of several processes alike
        return get_peft_model(student, config)


def check_not_sharded(trainer: Trainer) -> None:
    """Raise `ConversionError` where FSDP or DeepSpeed share weights out, into which an adapter could not be merged."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ConversionError(
            "adapter_rank goes with one process, or with several that each hold the model (DDP); under FSDP and "
            "DeepSpeed train the whole weights (--adapter-rank 0), which these share out."
        )


def merged(student: torch.nn.Module) -> PreTrainedModel:
    """The student as it was before `with_adapter`, with what the adapter has learnt in its weights."""
    student.merge_and_unload()  # of a sub-layer's router alone: what is in the sub-layer has another name afterwards
    return student.merge_and_unload()
