"""Two real processes over gloo: sharded training and inference equal one process, values and gradients."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch
from conftest import TINY
from finedeep import FinedeepConfig, FinedeepForCausalLM

SCRIPTS = pathlib.Path(__file__).parent / "processes"


def save_random(folder, **changes):
    torch.manual_seed(0)
    fields = {**TINY, "intermediate_size": 48, "num_experts_per_sublayer": 4, **changes}
    model = FinedeepForCausalLM(FinedeepConfig(**fields))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def passes(launcher, script, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPTS)}
    command = [sys.executable, "-m", *launcher, str(SCRIPTS / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")


def test_tensor_parallel(tmp_path):
    ways = {
        "shared": [{}, {"num_expert_sublayers": 1, "tie_word_embeddings": True}],
        "whole": [{"routing_function": "softmax"}, {"routing_input": "hidden_state"}, {"mlp_bias": True}],
        "refused": [{"num_experts_per_sublayer": 3}],
    }
    folders = [
        f"{save_random(tmp_path / f'{way}{i}', **changes)}={way}"
        for way, cases in ways.items()
        for i, changes in enumerate(cases)
    ]
    passes(TORCHRUN, "tensor_parallel.py", *folders)


def test_fully_shard(tmp_path):
    passes(TORCHRUN, "fully_shard.py", save_random(tmp_path))


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_accelerate(tmp_path, kind):
    pytest.importorskip("accelerate")
    passes(TORCHRUN, "accelerated.py", save_random(tmp_path), kind)


@pytest.mark.slow  # DeepSpeed compiles its communication for the CPU on first use
@pytest.mark.parametrize("leaf", ["none", "FinedeepSublayer"])
def test_zero3(tmp_path, monkeypatch, leaf):
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    passes(TORCHRUN, "zero3.py", save_random(tmp_path), leaf)
