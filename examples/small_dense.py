"""Train a small dense Llama on a text file: something to convert where no checkpoint is at hand.

    python examples/small_dense.py books_train.txt.xz ./books-dense --steps 1000

The text may be compressed (.xz). A byte-level BPE tokenizer is trained on its beginning; windows are drawn from the
whole text by the seed. The default model has 10.8 million parameters in 8 layers.
"""

import argparse
import lzma
from pathlib import Path

import numpy as np
import torch
from finedeep.demo.dense import train_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

CONTEXT = 256
BATCH = 16
PIECE = 2**17  # characters that are tokenised at a time


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1000, help=f"of {BATCH} x {CONTEXT} tokens (default: 1000)")
    parser.add_argument("--hidden-size", type=int, default=320)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    pieces = read_pieces(arguments.text)
    tokenizer = train_tokenizer(iter(pieces[:80]), arguments.vocabulary)
    windows = draw_windows(pieces, tokenizer, arguments.steps * BATCH, arguments.seed)
    torch.manual_seed(arguments.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=arguments.hidden_size,
            intermediate_size=arguments.hidden_size * 14 // 5,
            num_hidden_layers=arguments.layers,
            num_attention_heads=arguments.hidden_size // 64,
            num_key_value_heads=arguments.hidden_size // 64,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    print(f"{model.num_parameters():,} parameters, {windows.size:,} tokens")
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(arguments.folder.with_name(f"{arguments.folder.name}-trainer")),
            max_steps=arguments.steps,
            per_device_train_batch_size=BATCH,
            learning_rate=2e-3,
            adam_beta2=0.95,
            weight_decay=0.1,
            lr_scheduler_type="cosine",
            warmup_steps=min(100, arguments.steps // 10),
            use_cpu=not torch.accelerator.is_available(),
            bf16=torch.accelerator.is_available(),
            logging_steps=50,
            save_steps=250,
            save_total_limit=1,
            report_to="none",
            seed=arguments.seed,
        ),
        train_dataset=[{"input_ids": window, "labels": window} for window in torch.from_numpy(windows).long()],
    )
    trainer.train()
    model.save_pretrained(arguments.folder)
    tokenizer.save_pretrained(arguments.folder)


def read_pieces(path: Path) -> list[str]:
    """The text in pieces of some hundred kilobytes."""
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        text = file.read()
    return [text[begin : begin + PIECE] for begin in range(0, len(text), PIECE)]


def draw_windows(pieces: list[str], tokenizer: PreTrainedTokenizerFast, number: int, seed: int) -> np.ndarray:
    """(number, CONTEXT) token ids: `number` different windows from all over the text, in random order."""
    windows = []
    for piece in pieces:
        ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        windows.append(np.array(ids[: len(ids) // CONTEXT * CONTEXT], dtype=np.int32).reshape(-1, CONTEXT))
    windows = np.concatenate(windows)
    if number > len(windows):
        raise SystemExit(f"the text has {len(windows)} windows of {CONTEXT} tokens; {number} are needed. Fewer steps?")
    return np.random.default_rng(seed).permutation(windows)[:number]


if __name__ == "__main__":
    main()
