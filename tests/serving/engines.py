"""Run models in vLLM, one after the other: python engines.py JOBS.json ANSWERS.json.

A job has the name of a `folder`, the `engine`'s options, `requests` ({"ids", "adapter"} each), and how many `tokens` to
generate. Its answer has for each request the tokens, their log-probabilities and those of the prompt, or an error.
"""

import gc
import json
import os
import sys
import traceback
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, which imports vLLM but once
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # to cores; there may be fewer of them than processes
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # a function goes to the processes that hold a model

import vllm
from vllm.lora.request import LoRARequest

OPTIONS = {"trust_remote_code": True, "dtype": "float32", "max_model_len": 256, "max_num_seqs": 8}
OPTIONS |= {"distributed_executor_backend": "uni", "enable_prefix_caching": False}


def logprobs_of(ids, rows):
    return [None if row is None else row[token].logprob for token, row in zip(ids, rows or [], strict=False)]


def answers_of(outputs):
    return [
        {
            "ids": list(output.outputs[0].token_ids),
            "logprobs": logprobs_of(output.outputs[0].token_ids, output.outputs[0].logprobs),
            "prompt_logprobs": logprobs_of(output.prompt_token_ids, output.prompt_logprobs),
            "cached": output.num_cached_tokens,
        }
        for output in outputs
    ]


def module_of(model):
    return type(model).__module__


def run(job):
    engine = vllm.LLM(model=job["folder"], **{**OPTIONS, **job["engine"]})
    sampling = vllm.SamplingParams(
        temperature=0.0,
        max_tokens=job["tokens"],
        ignore_eos=True,
        logprobs=1,
        prompt_logprobs=1 if job.get("prompt_logprobs") else None,
    )
    prompts = [{"prompt_token_ids": request["ids"]} for request in job["requests"]]
    adapters = [
        LoRARequest(path, 1 + sorted(job["adapters"]).index(path), path) if path else None
        for path in (request.get("adapter") for request in job["requests"])
    ]
    adapters = adapters if any(adapters) else None
    rounds = [
        answers_of(engine.generate(prompts, sampling, use_tqdm=False, lora_request=adapters))
        for _ in range(job.get("rounds", 1))
    ]
    return {"rounds": rounds, "served_by": engine.apply_model(module_of)[0]}


def main():
    jobs, answers = Path(sys.argv[1]), Path(sys.argv[2])
    found = {}
    for name, job in json.loads(jobs.read_text()).items():
        try:
            found[name] = run(job)
        except Exception as error:
            traceback.print_exc()
            found[name] = {"error": f"{type(error).__name__}: {error}"}
        gc.collect()
        answers.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
