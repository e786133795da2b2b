"""Run in two processes: two processes continue what one has begun.

Arguments: the model's folder; that of the tasks; that in which the one has left its answers, `story` and `shots` done;
one with answers to all questions but the last of `sums`, which is for the first process to ask.
"""

import os
import sys

os.environ["ACCELERATE_USE_CPU"] = "true"

import torch
from finedeep.eval import evaluate
from finedeep.eval.compare.scores import scores_of
from finedeep.eval.scoring import harness
from lm_eval.models.huggingface import HFLM


def load_model(*arguments):
    """On CPUs the harness shares nothing out by itself; all that it does where it does, works there too."""
    lm = usual(*arguments)
    lm._rank, lm._world_size = lm.accelerator.process_index, lm.accelerator.num_processes
    assert lm._world_size == 2
    return lm


def watched(method):
    def ask(self, requests):
        asked.update(request.task_name for request in requests)
        return method(self, requests)

    return ask


usual, harness._load_model = harness._load_model, load_model
asked = set()
HFLM.loglikelihood, HFLM.loglikelihood_rolling = map(watched, (HFLM.loglikelihood, HFLM.loglikelihood_rolling))
model, tasks, work, answer_cache = sys.argv[1:]
how = {"tasks": ["story", "shots", "sums"], "include_path": tasks}
found = evaluate(model, work=work, **how)
# The examples of `shots` are others than those of one process.
assert asked == {"shots", "sums"}, asked
whole = evaluate(model, **how)
assert asked == {"story", "shots", "sums"}, asked
asked.clear()
from_cache = evaluate(model, answers=answer_cache, **how | {"tasks": ["story", "sums"]})
assert asked == {"sums"}, asked
if torch.distributed.get_rank() == 0:
    wanted = {place: score for place, score in scores_of(whole).items() if place.task != "shots"}
    assert scores_of(from_cache) == wanted
    assert scores_of(found) == scores_of(whole)
    for task, samples in whole["samples"].items():
        assert [sample["arguments"] for sample in found["samples"][task]] == [s["arguments"] for s in samples]
torch.distributed.destroy_process_group()
