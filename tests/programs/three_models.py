"""The three models that every program is given: dense, converted with M=1, which is exact, and with M=2."""

import pytest
import torch
from conftest import byte_tokenizer
from finedeep.convert import convert_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

CUTS = {"M=1": (1, 4), "M=2": (2, 2)}
NAMES = ["dense", *CUTS]
# All widths are multiples of 64: quantisers have groups.
SIZES = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
TOKENS = {"pad_token_id": 258, "bos_token_id": 256, "eos_token_id": 257}
TEXT = "Once upon a time a small dog met a cat at the river, and they went home together before the rain. "


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """{name: folder}. Dense weights are random and wide enough for the text's loss to tell models apart."""
    root = tmp_path_factory.mktemp("three")
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(**SIZES, **TOKENS))
    for name, parameter in dense.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    dense.save_pretrained(root / "dense")
    byte_tokenizer().save_pretrained(root / "dense")
    for name, (M, K) in CUTS.items():
        shape = {"num_expert_sublayers": M, "num_experts_per_sublayer": K}
        convert_checkpoint(root / "dense", root / name, **shape, progress=False)
    return {name: root / name for name in NAMES}


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def tokenizer_of(folder):
    return AutoTokenizer.from_pretrained(folder)


def token_ids(rows=2, length=64):
    ids = [ord(c) for c in TEXT * 3]
    return torch.tensor([ids[row : row + length] for row in range(rows)])


@torch.no_grad()
def loss_of(model):
    """Nats per token, on the text's bytes."""
    ids = token_ids()
    return model(input_ids=ids, labels=ids).loss.item()


def same(losses, tolerance=1e-5):
    """M=1 is the dense model; M=2 is a model."""
    assert losses["M=1"] == pytest.approx(losses["dense"], rel=tolerance), losses
    assert 0 < losses["M=2"] < 100, losses
