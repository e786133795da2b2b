"""Two real processes over gloo: sharded training and inference equal one process, values and gradients."""

import json
import os
import pathlib
import subprocess
import sys

import finedeep
import pytest
import torch
import transformers
import yaml
from conftest import TINY
from finedeep import FinedeepConfig, FinedeepForCausalLM
from finedeep.eval import evaluate
from finedeep.eval.compare.scores import scores_of
from finedeep.eval.scoring.local_tasks import write_task
from forked import run_script
from lm_eval.models.huggingface import HFLM
from transformers.dynamic_module_utils import get_cached_module_file

SCRIPTS = pathlib.Path(__file__).parent / "processes"


def save_random(folder, **changes):
    torch.manual_seed(0)
    fields = {**TINY, "intermediate_size": 48, "num_experts_per_sublayer": 4, **changes}
    model = FinedeepForCausalLM(FinedeepConfig(**fields))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    # transformers copies a folder's code in place: of two processes that do so at once, one may read half a file
    get_cached_module_file(str(folder), "modeling_finedeep.py")
    get_cached_module_file(str(folder), "configuration_finedeep.py")
    return folder


def passes(launcher, script, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPTS)}
    command = [sys.executable, "-m", *launcher, str(SCRIPTS / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


LAUNCH_FILES = pathlib.Path(__file__).parents[1] / "examples" / "launch"
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
    run_script(SCRIPTS / "tensor_parallel.py", *folders, processes=2)


def test_fully_shard(tmp_path):
    run_script(SCRIPTS / "fully_shard.py", save_random(tmp_path), processes=2)


@pytest.mark.slow  # FSDP2 below goes the same way, and further
def test_accelerate_ddp(tmp_path):
    passes(TORCHRUN, "accelerated.py", save_random(tmp_path), "DDP")


def test_accelerate_fsdp2_by_the_launch_file(tmp_path):
    """As a user launches it, but for the number of processes and the precision."""
    launch = ("accelerate.commands.launch", "--config_file", str(LAUNCH_FILES / "fsdp2.yaml"))
    passes((*launch, "--num_processes=2", "--mixed_precision=no"), "accelerated.py", save_random(tmp_path), "FSDP2")


@pytest.fixture
def tasks(tmp_path):
    """Texts, and questions with and without examples, of as many documents as two processes cannot share evenly."""
    questions = [{"question": f"{i}?", "choices": ["one", "two"], "answer": i % 2} for i in range(7)]
    data = {"story": [{"text": f"text {i} " * 40} for i in range(5)], "shots": questions, "sums": questions}
    for name, lines in data.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        kind = "text" if name == "story" else "multiple_choice"
        path = write_task(tmp_path, name, kind, tmp_path / f"{name}.jsonl")
    path = tmp_path / "shots.yaml"
    path.write_text(json.dumps({**yaml.safe_load(path.read_text()), "num_fewshot": 1, "fewshot_split": "test"}))
    return tmp_path


def test_scoring_goes_on_with_another_number_of_processes(tmp_path, monkeypatch, dense, tasks):
    if transformers.__version__ < "5":
        pytest.skip("without a GPU the harness names the device cpu:0, which transformers 4 has no weights loaded onto")

    def stop(line):
        if line.startswith("[2/3]"):
            raise KeyboardInterrupt

    how = {"tasks": ["story", "shots", "sums"], "include_path": tasks, "device": "cpu"}
    work = tmp_path / "work"
    with pytest.raises(KeyboardInterrupt):
        evaluate(dense, work=work, say=stop, **how)
    answer_cache = tmp_path / "answer_cache"
    evaluate(dense, answers=answer_cache, limit=6, **how | {"tasks": ["story", "sums"]})
    run_script(SCRIPTS / "evaluated.py", dense, tasks, work, answer_cache, processes=2)

    (work / "answers-2_all.json").unlink()  # as if the two had been stopped in `sums`
    asked = []
    usual = HFLM.loglikelihood
    monkeypatch.setattr(HFLM, "loglikelihood", lambda lm, requests: asked.extend(requests) or usual(lm, requests))
    monkeypatch.setattr(HFLM, "loglikelihood_rolling", None)
    found = evaluate(dense, work=work, **how)
    monkeypatch.undo()
    assert {request.doc_id for request in asked if request.task_name == "sums"} == {1, 3, 5}  # the second one's
    assert {request.task_name for request in asked} == {"shots", "sums"}
    assert scores_of(found) == scores_of(evaluate(dense, **how))


@pytest.mark.slow  # DeepSpeed compiles its communication for the CPU on first use
@pytest.mark.parametrize("leaf", ["none", "FinedeepSublayer"])
def test_zero3(tmp_path, monkeypatch, leaf):
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    passes(TORCHRUN, "zero3.py", save_random(tmp_path), leaf)


@pytest.mark.parametrize("file", sorted(LAUNCH_FILES.glob("*.yaml")), ids=lambda file: file.name)
def test_launch_files_are_what_accelerate_reads(file):
    """It refuses keys that it does not know; the classes they name are the model's."""
    config_args = pytest.importorskip("accelerate.commands.config.config_args")
    config = config_args.load_config_from_file(str(file))
    named = {key: value for key, value in {**config.fsdp_config, **config.deepspeed_config}.items() if "cls" in key}
    assert len(named) == 1
    for name in named.values():
        assert hasattr(finedeep.modeling_finedeep, name)
