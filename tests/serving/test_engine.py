"""vLLM's tokens and log-probabilities beside those of transformers, for the same folder.

vLLM runs in processes of their own, many models in each: importing it takes longer than serving a small model.
"""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import ADAPTERS, CONVERTED, FAMILIES, OPTIONS, Models
from peft import PeftModel
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
LENGTHS = (1, 2, 3, 5, 8, 40, 100, 200)
TOKENS = 24
NAMES = ["dense", *CONVERTED, *OPTIONS, *FAMILIES]
PLUGIN, BACKEND = "finedeep_serving.vllm_model", "vllm.model_executor.models.transformers"
MODES = {"eager": {"enforce_eager": True}, "compiled": {"enforce_eager": False}}
# A prompt of 200 tokens in four steps; its first full blocks of 32 are found again in the second round.
CHUNKS = {"enable_prefix_caching": True, "max_num_batched_tokens": 64, "max_num_seqs": 8, "block_size": 32}
LORA = {"enforce_eager": True, "enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
TWO = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in LENGTHS]


def job(folder, engine, **more):
    requests = [{"ids": ids} for ids in prompts()]
    return {"folder": str(folder), "engine": engine, "tokens": TOKENS, "requests": requests} | more


def with_adapters(models, name, adapters, engine):
    """Requests to each adapter, and to the model without one where that is None, all in one batch."""
    paths = [models.adapter(name, adapter) if adapter else None for adapter in adapters]
    requests = [{"ids": ids, "adapter": str(path) if path else None} for path in paths for ids in prompts()[-4:]]
    return job(models.folder(name), engine, requests=requests, adapters=[str(path) for path in paths if path])


def jobs_of(group, models):
    """{name: job} of a group that shares a process."""
    if group in MODES:
        return {name: job(models.folder(name), MODES[group], prompt_logprobs=True) for name in NAMES}
    if group == "chunks":
        return {mode: job(models.folder("M=2"), {**CHUNKS, **MODES[mode]}, rounds=2) for mode in MODES}
    if group == "backend":
        plain = {"model_impl": "transformers"}
        found = {
            f"{name}, {mode}": job(models.folder(name), {**plain, **MODES[mode]})
            for name in ("M=1", "M=2")
            for mode in MODES
        }
        attention = {"lora_target_modules": ["q_proj", "v_proj"]}
        return found | {
            "down": with_adapters(models, "M=2", ["down"], {**LORA, **plain}),
            "q, v": with_adapters(models, "M=2", ["q, v"], {**LORA, **plain, **attention}),
        }
    if group == "lora":
        found = {adapter: with_adapters(models, "M=2", [adapter], LORA) for adapter in ADAPTERS}
        return found | {
            "two": with_adapters(models, "M=2", ["all", "down"], LORA),
            "one and none": with_adapters(models, "M=2", ["all", None], LORA),
            "biases": with_adapters(models, "biases", ["down"], LORA),
            "sharded": with_adapters(models, "M=2", ["down"], {**LORA, "fully_sharded_loras": True}),
        }
    if group == "int8":
        return {
            name: job(folder, MODES["eager"], prompt_logprobs=True, requests=sampled_from(models, model))
            for model in ("dense", "M=1, zero routers", "M=2")
            for name, folder in ((model, models.folder(model)), (f"{model}: int8", models.quantised(model)))
        }
    assert group == "two processes"
    found = {name: job(models.folder(name), {**TWO, **MODES["eager"]}) for name in ("hidden state", "biases, softmax")}
    found["compiled"] = job(models.folder("M=2"), {**TWO, **MODES["compiled"]})
    found["lora"] = with_adapters(models, "M=2", ["all"], {**TWO, **LORA})
    return found


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def answers(models, tmp_path_factory):
    """What vLLM says to a group's jobs, all run the first time that one of them is asked for."""

    @functools.cache
    def run(group):
        folder = tmp_path_factory.mktemp("answers")
        jobs = jobs_of(group, models)
        (folder / "jobs.json").write_text(json.dumps(jobs))
        command = [sys.executable, HERE / "engines.py", folder / "jobs.json", folder / "answers.json"]
        with (folder / "log").open("w") as log:
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT)
        assert done.returncode == 0, (folder / "log").read_text()[-4000:]
        return jobs, json.loads((folder / "answers.json").read_text())

    return run


@functools.cache
def reference(folder, adapter=None):
    model = AutoModelForCausalLM.from_pretrained(folder)
    return (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()


@torch.no_grad()
def logprobs_of(model, ids):
    return model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)


def check(jobs, found, name, tolerance=1e-4, margin=1e-3):
    """Every token is transformers' best one, given those before it, and has its log-probability."""
    assert "error" not in found[name], found[name]
    the_job = jobs[name]
    tokens = 0
    for answers in found[name]["rounds"]:
        for request, answer in zip(the_job["requests"], answers, strict=True):
            ids, start = request["ids"] + answer["ids"], len(request["ids"])
            expected = logprobs_of(reference(the_job["folder"], request.get("adapter")), ids)
            before = expected[start - 1 : -1]
            given = torch.tensor(answer["ids"])
            torch.testing.assert_close(
                torch.tensor(answer["logprobs"]), before[range(len(given)), given], rtol=0, atol=tolerance
            )
            assert (before.max(-1).values - before[range(len(given)), given] < margin).all()
            tokens += (before.argmax(-1) == given).sum().item()
            if the_job.get("prompt_logprobs"):
                scored = torch.tensor(answer["prompt_logprobs"][1:])
                wanted = expected[: start - 1][range(start - 1), request["ids"][1:]]
                torch.testing.assert_close(scored, wanted, rtol=0, atol=tolerance)
    total = len(found[name]["rounds"]) * len(the_job["requests"]) * TOKENS
    assert tokens >= total - 2, f"{tokens} of {total} tokens"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_plugin_gives_what_transformers_gives(answers, mode, name):
    jobs, found = answers(mode)
    check(jobs, found, name)
    assert found[name]["served_by"] == (PLUGIN if name != "dense" else "vllm.model_executor.models.llama")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["M=1, zero routers", "grow, zero routers"])
def test_exact_conversions_say_what_vllms_own_llama_says(answers, mode, name):
    found = answers(mode)[1]
    assert [a["ids"] for a in found[name]["rounds"][0]] == [a["ids"] for a in found["dense"]["rounds"][0]]


@pytest.mark.parametrize("mode", MODES)
def test_chunked_prefill_and_a_prefix_that_is_cached(answers, mode):
    jobs, found = answers("chunks")
    check(jobs, found, mode)
    first, second = ([answer["cached"] for answer in answers] for answers in found[mode]["rounds"])
    assert sum(first) == 0
    assert second[-1] >= 160


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["M=1", "M=2"])
def test_the_backend_alone_gives_the_same(answers, mode, name):
    jobs, found = answers("backend")
    check(jobs, found, f"{name}, {mode}")
    assert found[f"{name}, {mode}"]["served_by"] == BACKEND


def test_the_backend_alone_serves_adapters_of_attention(answers):
    check(*answers("backend"), "q, v")


def test_the_backend_alone_refuses_adapters_of_down_proj(answers):
    assert "down_proj" in answers("backend")[1]["down"]["error"]
    assert "lora-target-modules" in answers("backend")[1]["down"]["error"]


@pytest.mark.parametrize("name", [*ADAPTERS, "two", "one and none", "biases"])
def test_adapters_say_what_they_say_in_peft(answers, name):
    jobs, found = answers("lora")
    check(jobs, found, name, tolerance=3e-4)
    adapted = [answer["ids"] for answer in found[name]["rounds"][0]]
    plain = [logprobs_of(reference(jobs[name]["folder"]), r["ids"])[-1].argmax() for r in jobs[name]["requests"]]
    assert any(ids[0] != first for ids, first in zip(adapted, plain, strict=True))


def test_sharded_adapters_are_refused(answers):
    assert "fully_sharded_loras=True" in answers("lora")[1]["sharded"]["error"]


@pytest.mark.parametrize("name", ["hidden state", "biases, softmax", "compiled", "lora"])
def test_two_processes_share_the_experts(answers, name):
    check(*answers("two processes"), name, tolerance=3e-4)


def sampled_from(models, name):
    """Texts that a model has said itself, on which its loss says something."""
    torch.manual_seed(0)
    model = reference(models.folder("M=2" if name == "M=2" else "dense"))
    ids = model.generate(torch.randint(0, 256, (8, 4)), do_sample=True, min_new_tokens=200, max_new_tokens=200)
    return [{"ids": row} for row in ids.tolist()]


def loss_of(answer):
    scored = [logprob for one in answer["rounds"][0] for logprob in one["prompt_logprobs"][4:]]
    return -sum(scored) / len(scored)


def test_int8_costs_what_it_costs_the_dense_model(answers):
    found = answers("int8")[1]
    assert not [answer for answer in found.values() if "error" in answer]
    losses = {name: loss_of(answer) for name, answer in found.items()}
    print(json.dumps(losses, indent=1))
    costs = {name: losses[f"{name}: int8"] - losses[name] for name in ("dense", "M=1, zero routers", "M=2")}
    assert costs["M=1, zero routers"] == pytest.approx(costs["dense"], abs=2e-3)
    # int8 products on a CPU without VNNI are some 4 % off, of which random gates pass on more
    assert abs(costs["M=2"]) < 4 * costs["dense"]
