"""The commands of docs/serving.md: the OpenAI-compatible server over loopback HTTP, its client, lm-eval, adapters."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from models import Models
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

DOCUMENT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
SERVE, LM_EVAL, WITH_ADAPTERS, _ = re.findall(r"```bash\n(.*?)\n```", DOCUMENT, re.DOTALL)
CLIENT, OFFLINE = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
SMALL = ["--dtype", "float32", "--max-model-len", "256", "--enforce-eager", "--max-num-seqs", "8"]
CHOICES = [
    {"question": f"What comes after {n}?", "choices": [str(n + 1), str(n * 2), "a cat"], "answer": 0} for n in range(8)
]
TASK = """
task: after
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with ./llama-finedeep and ./adapter, as the document assumes."""
    root = tmp_path_factory.mktemp("served")
    models = Models(root)
    (root / "llama-finedeep").symlink_to(models.folder("M=2"))
    (root / "adapter").symlink_to(models.adapter("M=2", "all"))
    (root / "questions.json").write_text("\n".join(map(json.dumps, CHOICES)))
    (root / "after.yaml").write_text(TASK.format(file=root / "questions.json"))
    return root


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def server(command, here):
    """The server of a documented command, with vLLM's module in place of its command. Gives the server's address."""
    _, _, model, *options = shlex.split(command)
    port = free_port()
    arguments = ["--model", model, *options, *SMALL, "--host", "127.0.0.1", "--port", str(port)]
    log = here / f"server-{port}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments],
            cwd=here, stdout=file, stderr=file, env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{address}/health")
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def address(here):
    with server(SERVE, here) as found:
        yield found


def test_the_client_snippet_and_its_log_probabilities(here, address, capsys):
    names = {}
    exec(CLIENT.replace("http://127.0.0.1:8000", address), names)
    choice = names["answer"].choices[0]
    tokenizer = AutoTokenizer.from_pretrained(here / "llama-finedeep", trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(here / "llama-finedeep", trust_remote_code=True)
    assert capsys.readouterr().out.strip() == choice.text.strip()
    prompt = tokenizer("Once upon a time")["input_ids"]
    stream = names["client"].completions.create(
        model="./llama-finedeep",
        prompt=prompt,
        max_tokens=20,
        temperature=0.0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    streamed = [chunk.choices[0].text for chunk in stream]
    whole = names["client"].completions.create(
        model="./llama-finedeep", prompt=prompt, max_tokens=20, temperature=0.0, logprobs=1,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    ).choices[0]  # fmt: skip
    assert len(streamed) > 5
    assert "".join(streamed) == whole.text
    with torch.no_grad():
        expected = model(torch.tensor([prompt + whole.token_ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    given = expected[range(20), whole.token_ids]
    assert expected.argmax(-1).tolist() == whole.token_ids
    torch.testing.assert_close(torch.tensor(whole.logprobs.token_logprobs), given, rtol=0, atol=1e-4)


def scores_of(command, here, out):
    subprocess.run(
        [sys.executable, "-m", *command, "--include_path", ".", "--output_path", out, "--log_samples"],
        cwd=here, check=True, capture_output=True,
    )  # fmt: skip
    (samples,) = (here / out).rglob("samples_after_*.jsonl")
    rows = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    return torch.tensor([[float(answer[0][0]) for answer in row["resps"]] for row in rows])


def test_lm_eval_scores_the_server_as_it_scores_the_model(here, address):
    by_server = shlex.split(LM_EVAL.replace("http://127.0.0.1:8000", address).replace("arc_easy", "after"))
    by_model = (
        "lm_eval --model hf --tasks after --model_args pretrained=./llama-finedeep,trust_remote_code=True,dtype=float32"
    )
    expected = scores_of(by_model.split(), here, "hf")
    torch.testing.assert_close(scores_of(by_server, here, "served"), expected, rtol=0, atol=1e-3)


def test_the_offline_snippet(here):
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE.replace("trust_remote_code=True", "trust_remote_code=True, enforce_eager=True")],
        cwd=here, env={**os.environ, **settings}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_an_adapter_is_served_by_name(here):
    with server(WITH_ADAPTERS, here) as address:
        client = OpenAI(base_url=f"{address}/v1", api_key="none")
        options = {"prompt": [1, 2, 3, 4], "max_tokens": 16, "temperature": 0.0, "extra_body": {"ignore_eos": True}}
        texts = [client.completions.create(model=m, **options).choices[0].text for m in ("./llama-finedeep", "mine")]
        assert texts[0] != texts[1]
