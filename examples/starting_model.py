"""A model before its training, as a recipe has it: with random weights, or those of a checkpoint."""

from collections.abc import Iterator
from itertools import chain

import from_checkout  # noqa: F401
import torch
from finedeep import FinedeepConfig, FinedeepForCausalLM
from ideas import IDEAS
from recipe import Recipe
from torch import nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
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
    """The model of the recipe's `start`, otherwise one with random weights. Exits where it lacks what is named."""
    built = (of_checkpoint if recipe.get("start") else of_random_weights)(recipe, tokenizer)
    built.set_attn_implementation(CAUSAL)
    for idea in recipe.get("ideas", []):
        IDEAS[idea](built)
    for parameter in chain.from_iterable(named(built, name) for name in recipe["freeze"]):
        parameter.requires_grad_(False)
    return built


def of_checkpoint(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """In float32, from a folder. The recipe's sizes say nothing then. Exits where the recipe's text does not fit.

    With `fresh: true` it has the folder's architecture and random weights, by the seed of the training.
    """
    if recipe.get("fresh"):
        torch.manual_seed(recipe["training"].get("seed", 0))
        built = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(recipe["start"]), dtype=torch.float32)
    else:
        built = AutoModelForCausalLM.from_pretrained(recipe["start"], dtype=torch.float32, trust_remote_code=False)
    needed = {"vocab_size": len(tokenizer), "max_position_embeddings": recipe["data"]["context"]}
    for field, least in needed.items():
        if (found := getattr(built.config, field)) < least:
            raise SystemExit(f"{recipe['start']} has {field}={found}; the recipe's tokenizer and context need {least}.")
    return built


@torch.no_grad()
def of_random_weights(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """By the seed of the training."""
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
    for name, how in recipe["initialise"].items():
        for parameter in named(built, name):
            INITIALISE[next(iter(how))](parameter, next(iter(how.values())))
    return built


def named(model: nn.Module, name: str) -> Iterator[nn.Parameter]:
    """The parameters whose names end so. Exits where there are none."""
    found = [parameter for full, parameter in model.named_parameters() if f".{full}".endswith(f".{name}")]
    if not found:
        raise SystemExit(f"{type(model).__name__} has no parameter whose name ends with {name!r}.")
    yield from found
