"""Transformers' `Trainer` with the loss of healing: next token, divergence from the teacher, hidden states."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from finedeep_files.errors import ConversionError
from finedeep_files.progress import in_words, say
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState, TrainingArguments


class HealingTrainer(Trainer):
    """`Trainer` with the loss (1 - divergence) * next-token loss + divergence * KL(teacher || student), in nats.

    In training, hidden_states * (1 - step / steps) * `hidden_state_distance` comes on top.
    """

    def __init__(
        self, *, teacher: PreTrainedModel | None, divergence: float, hidden_states: float = 0.0, **kwargs: Any
    ):
        super().__init__(**kwargs)
        self.hidden_states = hidden_states
        self.model_accepts_loss_kwargs = False  # the loss is a mean over a batch whose sequences are of one length
        self.divergence = divergence
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False) if teacher is not None else None
        self.sums: dict[str, torch.Tensor] = {}  # part of the loss -> (sum over sequences, sequences)

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, torch.Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Args: inputs with `input_ids` (batch, seq), every one of them text."""
        ids = inputs["input_ids"]
        pull = self.hidden_states * (1 - self.state.global_step / max(1, self.state.max_steps)) * model.training
        ask = {"input_ids": ids, "use_cache": False, "output_hidden_states": pull > 0}
        outputs = model(**ask)
        logits = outputs.logits.float()
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.divergence < 1):
            parts = {"next_token": nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())}
        if self.teacher is not None:
            with torch.no_grad():
                of_teacher = self.teacher(**ask)
                wanted, states = of_teacher.logits.float().log_softmax(-1), of_teacher.hidden_states
                del of_teacher  # and its logits
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.divergence > 0):
                divergence = nn.functional.kl_div(logits.log_softmax(-1), wanted, log_target=True, reduction="none")
                parts["divergence"] = divergence.sum(-1).mean()
            if pull:
                if torch.is_grad_enabled() and not outputs.hidden_states[1].requires_grad:
                    raise ConversionError(
                        "activation checkpointing with use_reentrant=true cuts hidden states off from the gradient: "
                        "--set 'gradient_checkpointing_kwargs={\"use_reentrant\": false}', or --hidden-states 0."
                    )
                parts["hidden_states"] = hidden_state_distance(outputs.hidden_states, states)
        for name, value in parts.items():
            name = name if model.training else f"eval_{name}"
            self.sums[name] = self.sums.get(name, 0) + torch.stack([value.detach(), torch.ones_like(value)]) * len(ids)
        weights = {"next_token": 1 - self.divergence, "divergence": self.divergence, "hidden_states": pull}
        loss = sum(weights[name] * part for name, part in parts.items() if weights[name])
        return (loss, {"logits": outputs.logits}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the parts of the loss beside it, means over all processes."""
        evaluating = any(name.startswith("eval_") for name in logs)
        for name in [name for name in self.sums if name.startswith("eval_") == evaluating]:
            total, number = self.accelerator.reduce(self.sums.pop(name), reduction="sum").tolist()
            logs[name] = total / number
        super().log(logs, *args, **kwargs)


class TimeLeft(TrainerCallback):
    """A line with the time left, wherever losses are logged."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.begin, self.first = time.perf_counter(), state.global_step

    def on_log(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        done = state.global_step - self.first
        if done and state.is_world_process_zero and state.global_step < state.max_steps:
            left = (time.perf_counter() - self.begin) / done * (state.max_steps - state.global_step)
            say(f"Healing: step {state.global_step:,} of {state.max_steps:,}, {in_words(left)} left")


def hidden_state_distance(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean over layers and tokens of |h - h*|² / |h*|².

    Args: as models return them, the embeddings and each layer's output, the last after the final norm; (batch, seq,
    hidden) each.
    """
    distances = []
    for h, wanted in zip(student[1:], teacher[1:], strict=True):
        size = wanted.float().pow(2).sum(-1)
        size = size.clamp_min(1e-4 * size.mean())  # of a padding token's embedding, which may be 0
        distances.append(((h.float() - wanted).pow(2).sum(-1) / size).mean())
    return torch.stack(distances).mean()
