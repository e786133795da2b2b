"""TRL's trainers: a few steps of each, M=1 with the dense model's losses, M=2 running."""

import pytest
import torch
from three_models import TEXT, same, tokenizer_of
from three_models import load as load_whole

pytest_plugins = "three_models"
pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402
from peft import LoraConfig, TaskType  # noqa: E402
from transformers import AutoModelForSequenceClassification  # noqa: E402
from trl import (  # noqa: E402
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

STEPS = 3
QUIET = {"max_steps": STEPS, "logging_steps": 1, "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True}
QUIET |= {
    "save_strategy": "no",
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "gradient_checkpointing": False,
}
TEXTS = [TEXT[i : i + 60] for i in range(12)]
PLAIN = [{"text": text} for text in TEXTS]
PAIRS = [{"prompt": text[:20], "chosen": text[20:40], "rejected": text[40:]} for text in TEXTS]
ANSWERS = [{"prompt": text[:20], "completion": text[20:40], "label": i % 2 == 0} for i, text in enumerate(TEXTS)]
PROMPTS = [{"prompt": text[:20]} for text in TEXTS]


def load(folder):
    """Without training the routers, which the dense model has not: all losses are then the same."""
    return frozen(load_whole(folder))


def frozen(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("router" not in name)
    return model


def lora(task=TaskType.CAUSAL_LM):
    return LoraConfig(r=4, target_modules="all-linear", task_type=task, lora_dropout=0.0, init_lora_weights=True)


def scored(folder):
    return frozen(
        AutoModelForSequenceClassification.from_pretrained(
            folder, trust_remote_code=True, num_labels=1, pad_token_id=258
        )
    )


def length(completions, **_):
    return [float(len(set(completion))) for completion in completions]


def sft(folder, place, packing=False, adapter=None):
    arguments = SFTConfig(place, **QUIET, packing=packing, max_length=48)
    return SFTTrainer(
        load(folder),
        arguments,
        train_dataset=Dataset.from_list(PLAIN),
        peft_config=adapter,
        processing_class=tokenizer_of(folder),
    )


def dpo(folder, place, adapter=None):
    arguments = DPOConfig(place, **QUIET, max_length=64, model_init_kwargs=None)
    options = {"train_dataset": Dataset.from_list(PAIRS), "processing_class": tokenizer_of(folder)}
    return DPOTrainer(
        load(folder), args=arguments, peft_config=adapter, ref_model=None if adapter else load(folder), **options
    )


def kto(folder, place):
    options = {"train_dataset": Dataset.from_list(ANSWERS), "processing_class": tokenizer_of(folder)}
    return KTOTrainer(load(folder), ref_model=load(folder), args=KTOConfig(place, **QUIET, max_length=64), **options)


def reward(folder, place, adapter=None):
    pairs = [{"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in PAIRS]
    torch.manual_seed(0)  # for the head
    arguments = RewardConfig(place, **QUIET, max_length=64)
    return RewardTrainer(
        scored(folder),
        arguments,
        train_dataset=Dataset.from_list(pairs),
        peft_config=adapter,
        processing_class=tokenizer_of(folder),
    )


def grpo(folder, place, adapter=None):
    more = {"num_generations": 2, "max_completion_length": 6}
    arguments = GRPOConfig(place, **QUIET, **more)
    options = {"train_dataset": Dataset.from_list(PROMPTS), "processing_class": tokenizer_of(folder)}
    return GRPOTrainer(load(folder), reward_funcs=length, args=arguments, peft_config=adapter, **options)


TRAINERS = {
    "SFT": sft,
    "SFT, packed": lambda folder, place: sft(folder, place, packing=True),
    "SFT, LoRA": lambda folder, place: sft(folder, place, adapter=lora()),
    "DPO": dpo,
    "DPO, LoRA": lambda folder, place: dpo(folder, place, adapter=lora()),
    "KTO": kto,
    "reward": reward,
    "reward, LoRA": lambda folder, place: reward(folder, place, adapter=lora(TaskType.SEQ_CLS)),
}
# Where text is sampled, a rounding can turn a token, and all that comes after it is another text.
SAMPLING = {"GRPO": grpo, "GRPO, LoRA": lambda folder, place: grpo(folder, place, adapter=lora())}


def losses_of(make, folder, place):
    torch.manual_seed(0)
    trainer = make(folder, str(place))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_trainer_gives_m_1_the_dense_models_losses(folders, tmp_path, kind):
    losses = {name: losses_of(TRAINERS[kind], folder, tmp_path / name) for name, folder in folders.items()}
    print(kind, losses)
    assert all(len(found) == STEPS for found in losses.values())
    for step in range(STEPS):
        same({name: found[step] for name, found in losses.items()}, 1e-3)


@pytest.mark.parametrize("kind", SAMPLING)
def test_a_trainer_that_samples_runs(folders, tmp_path, kind):
    for name, folder in folders.items():
        found = losses_of(SAMPLING[kind], folder, tmp_path / name)
        assert len(found) == STEPS
        assert all(loss == loss for loss in found)
