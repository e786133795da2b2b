"""Shared fixtures: tiny dense checkpoints made on the spot, and the real one where it is at hand."""

import inspect
import os
import shutil
import sys
import tempfile
from pathlib import Path

# Before any Hugging Face import: no network, no traces in the user's cache, no chatter.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="finedeep-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Triton kernels run in its interpreter where there is no GPU; Triton asks when it is imported.
if not os.path.exists("/dev/nvidia0"):
    os.environ["TRITON_INTERPRET"] = "1"

# Where the package is not installed, as on a machine that is only there for its GPU, it is this checkout.
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import from_checkout  # noqa: F401
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast

# Real data for larger checks. It is not part of the project.
DATA = Path(os.environ.get("FINEDEEP_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))

# What this version of transformers calls the cache that a model is given and gives back.
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"

TINY = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_theta": 5000.0,
    "pad_token_id": 258,
    "bos_token_id": 256,
    "eos_token_id": 257,
}


def pytest_unconfigure():
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def data():
    if not DATA.is_dir():
        pytest.skip(f"the real checkpoint and texts are not at {DATA}; FINEDEEP_TEST_DATA names another place")
    return DATA


@pytest.fixture(scope="session")
def stories260k(data):
    folder = data / "stories260k"
    try:
        AutoTokenizer.from_pretrained(folder)
    except ValueError:
        pytest.skip("transformers 5 saved this checkpoint's tokenizer in a form that transformers 4 cannot read")
    return folder


def byte_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return fast


def make_dense(folder, dtype=torch.float32, shard_size="5GB", **changes):
    """A dense Llama with random weights, every one of them away from its initial zero or one."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**TINY, **changes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    byte_tokenizer().save_pretrained(folder)
    return folder


def random_model(cls=None, **changes):
    """A tiny Finedeep model in eval mode, M = 2 and K = 4, whose routers and norms are random too."""
    from finedeep import FinedeepConfig, FinedeepForCausalLM

    torch.manual_seed(0)
    fields = {**TINY, "intermediate_size": 48, "num_experts_per_sublayer": 4, **changes}
    model = (cls or FinedeepForCausalLM)(FinedeepConfig(**fields))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    return make_dense(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="session")
def converted(dense, tmp_path_factory):
    """The dense model with M=1, K=8: exact, and padded from 44 to 48 neurons."""
    from finedeep.convert import convert_checkpoint

    folder = tmp_path_factory.mktemp("converted") / "exact"
    convert_checkpoint(dense, folder, num_expert_sublayers=1, num_experts_per_sublayer=8, progress=False)
    return folder


def copy_first_layers(source, folder, layers):
    """A Llama checkpoint's first layers, its embeddings and its tokenizer, as a checkpoint of its own."""
    config = LlamaConfig.from_pretrained(source, num_hidden_layers=layers)
    model = LlamaForCausalLM.from_pretrained(source, config=config)  # which warns of the layers that it leaves out
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder
