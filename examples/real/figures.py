"""What is measured of a converted model beside its dense one. Each function returns what JSON can hold."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import mean_loss
from quantisation import torchao_int8
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

# The command; and the largest resident set of its process alone, for getrusage counts what a process was before it.
WITH_PEAK = """
import sys
from finedeep_cli import main
status = main(sys.argv[2:])
(line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
open(sys.argv[1], "w").write(str(int(line.split()[1]) * 1024))
sys.exit(status)
"""
WINDOW = 512
PROMPTS = (
    "What is the capital of France?",
    "Explain why the sky is blue in two sentences.",
    "Write a haiku about the sea.",
    "List three uses of a paper clip.",
    "What is 17 plus 25?",
    "Translate 'good morning' into Spanish.",
    "Who wrote Romeo and Juliet?",
    "Give me a recipe for pancakes.",
    "What does a compiler do?",
    "Tell me a short story about a dog and a lighthouse.",
)
NEW_TOKENS = 48
Windows = Mapping[str, torch.Tensor]


def finedeep(arguments: Sequence[Any], log: Path) -> dict[str, float]:
    """Run a `finedeep` command in a process of its own, its output in `log`. Returns its seconds and peak memory.

    With `--resume` among the arguments, what stopped attempts took is in them; `log` has it beside it, as `*.took`.
    """
    took, peak = log.with_suffix(".took"), log.with_suffix(".peak")
    peak.unlink(missing_ok=True)
    if "--resume" not in arguments:
        took.unlink(missing_ok=True)
    begin = time.perf_counter()
    with log.open("a", encoding="utf-8") as file:
        command = [sys.executable, "-c", WITH_PEAK, str(peak), *map(str, arguments)]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds, of_cores = time.perf_counter() - begin, usage.ru_utime + usage.ru_stime
    with took.open("a", encoding="utf-8") as file:
        print(json.dumps([round(seconds, 1), round(of_cores, 1)]), file=file)
    if process.returncode:
        raise SystemExit(f"`finedeep {' '.join(map(str, arguments))}` failed; {log} says why.")
    attempts = [json.loads(line) for line in took.read_text(encoding="utf-8").splitlines()]
    wall, cpu = (round(sum(part), 1) for part in zip(*attempts, strict=True))
    return {"seconds": wall, "cpu_seconds": cpu, "peak_bytes": int(peak.read_text())}


def text_windows(folder: Path, texts: Mapping[str, Path], number: int) -> Windows:
    """Of each text `number` windows (number, WINDOW) of token ids, spread evenly over it."""
    tokenizer, found = AutoTokenizer.from_pretrained(folder), {}
    for name, path in texts.items():
        ids = tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"]
        windows = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)
        found[name] = windows[torch.linspace(0, len(windows) - 1, min(number, len(windows))).long()]
    return found


def load(folder: Path) -> PreTrainedModel:
    """A model in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def in_bfloat16(folder: Path) -> PreTrainedModel:
    """A model whose weights are rounded to bfloat16."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


PRECISIONS: dict[str, Callable[[Path], nn.Module]] = {
    "float32": load,
    "bfloat16": in_bfloat16,
    "int8": lambda folder: torchao_int8(str(folder)),
}


def losses_by_precision(folder: Path, windows: torch.Tensor) -> dict[str, float]:
    """Mean next-token loss over windows (number, WINDOW), in nats, with the weights in each precision."""
    return {name: mean_loss(loaded(folder), windows) for name, loaded in PRECISIONS.items()}


@torch.inference_mode()
def hidden_states(model: PreTrainedModel, windows: Windows) -> dict[str, torch.Tensor]:
    """What the head reads, (number, WINDOW, hidden), of each text."""
    return {
        name: torch.cat([model.model(ids[None], use_cache=False).last_hidden_state for ids in some])
        for name, some in windows.items()
    }


@torch.inference_mode()
def beside(
    heads: tuple[nn.Module, nn.Module], windows: Windows, dense: Windows, converted: Windows
) -> dict[str, dict[str, float]]:
    """Of each text: both losses and the KL divergence from dense, nats a token, and how far the logits are apart.

    Args:
        heads: from hidden states to logits, the dense model's and the converted one's, which healing trains.
        windows: token ids.
        dense: the dense model's hidden states.
        converted: the converted model's.
    """
    found = {}
    for name, ids in windows.items():
        sums = {"dense_loss": 0.0, "loss": 0.0, "kl": 0.0, "first_choice_differs": 0.0}
        largest = size = 0.0
        for row, *states in zip(ids, dense[name], converted[name], strict=True):
            before, after = (head(h) for head, h in zip(heads, states, strict=True))
            p, q = before.log_softmax(-1), after.log_softmax(-1)
            sums["dense_loss"] += nn.functional.nll_loss(p[:-1], row[1:]).item()
            sums["loss"] += nn.functional.nll_loss(q[:-1], row[1:]).item()
            sums["kl"] += nn.functional.kl_div(q, p, log_target=True, reduction="batchmean").item()
            sums["first_choice_differs"] += (before.argmax(-1) != after.argmax(-1)).float().mean().item()
            largest = max(largest, (before - after).abs().max().item())
            size = max(size, before.abs().max().item())
        found[name] = {key: total / len(ids) for key, total in sums.items()}
        found[name] |= {"tokens": ids.numel(), "largest_logit_difference": largest, "largest_logit": size}
    return found


@torch.inference_mode()
def answers(model: PreTrainedModel, folder: Path, prompts: Sequence[str] = PROMPTS) -> list[str]:
    """Greedy answers to the prompts, by the folder's chat template."""
    tokenizer, found = AutoTokenizer.from_pretrained(folder), []
    for prompt in prompts:
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        text = model.generate(**asked, max_new_tokens=NEW_TOKENS, do_sample=False)[0, asked["input_ids"].shape[1] :]
        found.append(tokenizer.decode(text, skip_special_tokens=True))
    return found


def weights(folder: Path) -> dict[str, int]:
    """Bytes of the folder's weights."""
    return {"weight_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors"))}


def read(path: Path) -> Any:
    """A JSON file's content; an empty dictionary where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
