"""A model with random weights, as a recipe has it."""

from collections.abc import Iterator
from itertools import chain

import from_checkout  # noqa: F401
import torch
from finedeep import FinedeepConfig, FinedeepForCausalLM
from recipe import Recipe
from torch import nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.sdpa_attention import sdpa_attention_forward

KINDS = {"llama": (LlamaConfig, LlamaForCausalLM), "finedeep": (FinedeepConfig, FinedeepForCausalLM)}
INITIALISE = {
    "value": nn.init.constant_,
    "std": lambda parameter, std: nn.init.normal_(parameter, std=std),
    "scale": lambda parameter, factor: parameter.mul_(factor),
}
# Windows have no padding. Without a mask, which a compiled model would otherwise be given, torch takes its fast kernel.
CAUSAL = "sdpa_causal"
AttentionInterface.register(CAUSAL, sdpa_attention_forward)


def model_of(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A model with random weights, by the seed of the training. Exits where it lacks a parameter that is named."""
    kind = recipe["model"]
    config, model = KINDS[kind]
    torch.manual_seed(recipe["training"].get("seed", 0))
    built = model(
        config(
            vocab_size=len(tokenizer),
            max_position_embeddings=recipe["data"]["context"],
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **recipe["sizes"],
            **recipe[kind],
        )
    )
    built.set_attn_implementation(CAUSAL)
    with torch.no_grad():
        for name, how in recipe["initialise"].items():
            for parameter in named(built, name):
                INITIALISE[next(iter(how))](parameter, next(iter(how.values())))
    for parameter in chain.from_iterable(named(built, name) for name in recipe["freeze"]):
        parameter.requires_grad_(False)
    return built


def named(model: nn.Module, name: str) -> Iterator[nn.Parameter]:
    """The parameters whose names end so. Exits where there are none."""
    found = [parameter for full, parameter in model.named_parameters() if f".{full}".endswith(f".{name}")]
    if not found:
        raise SystemExit(f"{type(model).__name__} has no parameter whose name ends with {name!r}.")
    yield from found
