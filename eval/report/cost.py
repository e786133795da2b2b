"""What models cost, measured side by side: parameters, FLOPs, tokens per second, peak memory.

    python -m finedeep.eval.report.cost MODEL DEVICE DTYPE PROMPT

prints the peak memory of one model in a process of its own, in bytes.
"""

import inspect
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from finedeep_files.peak_memory import peak_during, printed_by
from finedeep_files.processor import processor
from finedeep_files.timing import Work, interleaved, let_go, quartiles
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel

from ..compare.table import aligned_markdown
from ..errors import EvaluationError
from ..inspect.inspection import load

PROMPT = 512  # tokens, or as many as the model has positions for
NEW = 8  # tokens that are decoded one by one after it
# What a forward calls its cache; transformers 5.24 has renamed it.
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
SECONDS = 5.0  # for each kind of work, both models together


def costs_of(models: Mapping[str, str | Path], device: str | None, dtype: str) -> dict[str, Any]:
    """Measure the models in turn, so that what disturbs one disturbs the other.

    Returns:
        `prompt` and `threads`; and for each model in `models`: `parameters`; `flops_per_token`, of the matrix
        products over a prompt (torch's own count); `prefill` and `decode`, tokens per second in a batch of one, as
        (lower quartile, median, upper quartile) over rounds; `peak_memory` in bytes: of loading, prompt and decoding.

    Raises:
        EvaluationError: a model cannot be loaded.
    """
    loaded = {name: load(model, device, dtype)[0] for name, model in models.items()}
    on = next(iter(loaded.values())).device.type
    prompt = max(1, min([PROMPT, *(m.config.max_position_embeddings - NEW for m in loaded.values())]))
    ids = {name: ids_for(model, prompt + NEW) for name, model in loaded.items()}
    found: dict[str, dict[str, Any]] = {
        name: {
            "model": str(models[name]),
            "parameters": model.num_parameters(),
            "flops_per_token": flops(model, ids[name][:, :prompt]) / prompt,
        }
        for name, model in loaded.items()
    }
    prefills = {name: Work(lambda: None, partial(prefill, m, ids[name][:, :prompt])) for name, m in loaded.items()}
    decodes = {
        name: Work(partial(prefill, m, ids[name][:, :prompt]), partial(decode, m, ids[name][:, prompt:]))
        for name, m in loaded.items()
    }
    for work, tokens, works in (("prefill", prompt, prefills), ("decode", NEW, decodes)):
        for name, taken in interleaved(works, SECONDS, on).items():
            found[name][work] = quartiles([tokens / t for t in taken])
    del loaded, prefills, decodes, works
    let_go(on)  # for the processes that follow
    for name, model in models.items():
        found[name]["peak_memory"] = peak_memory(model, device or on, dtype, prompt)
    name = torch.cuda.get_device_name() if on == "cuda" else processor()
    return {"prompt": prompt, "threads": torch.get_num_threads(), "device": name, "models": found}


def ids_for(model: PreTrainedModel, tokens: int) -> torch.Tensor:
    """Seeded token ids (1, tokens)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (1, tokens), generator=generator).to(model.device)


@torch.no_grad()
def prefill(model: PreTrainedModel, ids: torch.Tensor, _: Any = None) -> DynamicCache:
    """A filled cache. Args: ids (1, seq)."""
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, **{CACHE: cache}, logits_to_keep=1)
    return cache


@torch.no_grad()
def decode(model: PreTrainedModel, ids: torch.Tensor, cache: DynamicCache) -> None:
    """One token after the other. Args: ids (1, seq)."""
    for token in ids.split(1, dim=1):
        model(input_ids=token, **{CACHE: cache})


def flops(model: PreTrainedModel, ids: torch.Tensor) -> int:
    """FLOPs of the matrix products of a forward over ids (1, seq), attention's among them."""
    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")  # fused kernels are not all known to the counter
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    model.set_attn_implementation(usual)
    return counter.get_total_flops()


def peak_memory(model: str | Path, device: str, dtype: str, prompt: int) -> int:
    """Bytes at the most in a process of its own: on a GPU what torch allocates, on a CPU the resident set's rise."""
    try:
        return int(printed_by(__spec__.name, str(model), device, dtype, str(prompt)))
    except RuntimeError as error:
        raise EvaluationError(f"{model} could not be run in a process of its own ({error}).") from error


def run_once(model: str, device: str, dtype: str, prompt: int) -> None:
    """Load, read a prompt, decode a few tokens."""
    loaded, _ = load(model, device, dtype)
    ids = ids_for(loaded, prompt + NEW)
    decode(loaded, ids[:, prompt:], prefill(loaded, ids[:, :prompt]))


def rows_of(costs: Mapping[str, Any]) -> list[list[str]]:
    """Models side by side, and the last one's figures over the first one's."""
    found = list(costs["models"].values())
    rows = []
    for label, figure, form in ROWS:
        values = list(map(figure, found))
        ratio = f"{values[-1] / values[0]:.3f}" if values[0] else ""  # a device that does not count its memory
        rows.append([label, *map(form, values), ratio])
    return rows


def table_of(costs: Mapping[str, Any]) -> str:
    """The same as a Markdown table."""
    return aligned_markdown(["", *costs["models"], "ratio"], rows_of(costs), 1)


def _large(value: float) -> str:
    return f"{value:,.0f}"


# What is shown of the costs: a label, the figure, its form.
ROWS = (
    ("parameters", lambda found: found["parameters"], _large),
    ("FLOPs per token of a prompt", lambda found: found["flops_per_token"], _large),
    ("prompt, tokens per second", lambda found: found["prefill"][1], _large),
    ("decoding, tokens per second", lambda found: found["decode"][1], _large),
    ("peak memory, MB", lambda found: found["peak_memory"] / 1e6, _large),
)

if __name__ == "__main__":
    model, device, dtype, prompt = sys.argv[1:]
    print(peak_during(lambda: run_once(model, device, dtype, int(prompt)), device))
