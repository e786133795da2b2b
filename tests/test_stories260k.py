"""The real, published checkpoint: exact with one sub-layer, and what a plain cut into more costs."""

import pytest
import torch
from finedeep.convert import convert_checkpoint
from finedeep.eval import EvaluationError, evaluate
from finedeep.eval.compare.scores import scores_of
from finedeep.eval.scoring.local_tasks import write_task
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM


@pytest.fixture(scope="module")
def exact(stories260k, tmp_path_factory):
    folder = tmp_path_factory.mktemp("real") / "exact"
    convert_checkpoint(stories260k, folder, num_expert_sublayers=1, num_experts_per_sublayer=8, progress=False)
    return folder


@pytest.fixture(scope="module")
def windows(data, stories260k):
    ids = AutoTokenizer.from_pretrained(stories260k)((data / "text/tinystories.txt").read_text())["input_ids"]
    return torch.tensor(ids[: len(ids) // 512 * 512]).view(-1, 512)


@torch.no_grad()
def loss_and_logits(folder, windows, model_class=AutoModelForCausalLM):
    out = model_class.from_pretrained(folder).eval()(windows, labels=windows)
    return out.loss.item(), out.logits


def test_one_sublayer_is_the_dense_model(stories260k, exact, windows):
    dense_loss, dense_logits = loss_and_logits(stories260k, windows, LlamaForCausalLM)
    loss, logits = loss_and_logits(exact, windows)
    assert 1.6 < dense_loss < 1.9  # a real model on its own kind of text
    assert (logits - dense_logits).abs().max() < 1e-4
    assert abs(loss - dense_loss) < 1e-5


def test_greedy_text_is_the_dense_models(stories260k, exact):
    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    prompt = tokenizer("Once upon a time", return_tensors="pt")
    texts = [
        model_class.from_pretrained(folder).generate(**prompt, max_new_tokens=200, do_sample=False, eos_token_id=None)
        for model_class, folder in ((LlamaForCausalLM, stories260k), (AutoModelForCausalLM, exact))
    ]
    assert texts[0].shape[1] == prompt.input_ids.shape[1] + 200
    assert torch.equal(*texts)


@pytest.mark.parametrize(("M", "K"), [(2, 8), (4, 4)])
def test_a_plain_cut_runs_and_costs(tmp_path, stories260k, windows, M, K):
    convert_checkpoint(
        stories260k, tmp_path / "out", num_expert_sublayers=M, num_experts_per_sublayer=K, progress=False
    )
    dense_loss, _ = loss_and_logits(stories260k, windows, LlamaForCausalLM)
    loss, _ = loss_and_logits(tmp_path / "out", windows)
    print(f"M={M} K={K}: {loss:.3f} nats per token, dense {dense_loss:.3f}")
    # worse than dense, as the design says of any cut, and yet far from the uniform guess log(512) = 6.24
    assert dense_loss < loss < 4


def test_benchmark_questions_score_the_same(tmp_path, data, stories260k, exact):
    names = ["arc_easy", "piqa"]
    for name in names:
        write_task(tmp_path, f"local_{name}", "multiple_choice", data / f"benchmarks/{name}.jsonl")
    dense, finedeep = (
        scores_of(evaluate(folder, [f"local_{n}" for n in names], include_path=tmp_path, limit=25, batch_size=32))
        for folder in (stories260k, exact)
    )
    assert len(dense) == 4
    assert dense == finedeep


def test_an_answer_longer_than_the_model_is_named(tmp_path, exact):
    (tmp_path / "long.jsonl").write_text('{"question": "?", "choices": ["a", "' + "word " * 600 + '"], "answer": 0}\n')
    write_task(tmp_path, "long", "multiple_choice", tmp_path / "long.jsonl")
    with pytest.raises(EvaluationError, match="--max-length"):
        evaluate(exact, ["long"], include_path=tmp_path)


@pytest.mark.slow
def test_all_benchmark_questions_score_the_same(tmp_path, data, stories260k, exact):
    for name in ("arc_easy", "piqa", "openbookqa"):
        write_task(tmp_path, f"local_{name}", "multiple_choice", data / f"benchmarks/{name}.jsonl")
    names = ["local_arc_easy", "local_piqa", "local_openbookqa"]
    dense, finedeep = (
        scores_of(evaluate(folder, names, include_path=tmp_path, batch_size=64, max_length=1024))
        for folder in (stories260k, exact)
    )
    assert dense == finedeep
