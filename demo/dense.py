"""Train a tokenizer and a small dense Llama on a stream of texts."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"
VOCABULARY = 512
CONTEXT = 128
BATCH = 16
PEAK_LEARNING_RATE = 3e-3
WARMUP_STEPS = 40


def train_tokenizer(texts: Iterator[str], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Byte-level BPE on the first texts of the stream."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(islice(texts, 2000), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_input_names=["input_ids", "attention_mask"],
    )


def packed_batches(texts: Iterator[str], tokenizer: PreTrainedTokenizerFast) -> Iterator[torch.Tensor]:
    """Texts one after the other, each begun by BOS and ended by EOS, cut into (BATCH, CONTEXT) token ids."""
    pending: list[int] = []
    while True:
        while len(pending) < BATCH * CONTEXT:
            for ids in tokenizer(list(islice(texts, 64)))["input_ids"]:
                pending += [*ids, tokenizer.eos_token_id]
        yield torch.tensor(pending[: BATCH * CONTEXT]).view(BATCH, CONTEXT)
        pending = pending[BATCH * CONTEXT :]


def train_dense(folder: Path, texts: Iterator[str], steps: int, seed: int) -> float:
    """Train, and save model and tokenizer into `folder`. Returns the mean loss of the last tenth of the steps."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(texts)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LEARNING_RATE, total_steps=max(steps, 2), pct_start=min(0.3, WARMUP_STEPS / steps)
    )
    losses = []
    bar = tqdm(zip(range(steps), packed_batches(texts, tokenizer), strict=False), total=steps, desc="Training dense")
    for _, batch in bar:
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)
