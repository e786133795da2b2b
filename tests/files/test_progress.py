"""Long work shows how far it has come, in a log too, and says before it starts what there is to do."""

import re

import pytest
from finedeep.convert import convert_checkpoint
from finedeep.convert.calibrate.text import sampled_windows
from finedeep.convert.heal import heal
from finedeep_files.progress import Progress, in_words
from transformers import LlamaForCausalLM


def test_sampling_moves_within_a_batch(dense, capsys):
    """One batch of 8 texts: in a log a line at each tenth."""
    model = LlamaForCausalLM.from_pretrained(dense)
    sampled_windows(model, 1024, 0, True)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Sampling: ")]
    assert len(lines) >= 9
    assert re.fullmatch(r"Sampling: \d+ of 1,024 tokens, about \d+ s left", lines[0])


def test_what_is_sampled_is_counted_whole(dense, monkeypatch):
    model = LlamaForCausalLM.from_pretrained(dense)
    counted = []
    monkeypatch.setattr(Progress, "update", lambda self, number=1: counted.append(number))
    assert sampled_windows(model, 1024, 0, False).numel() == sum(counted) == 1024


def test_quiet_is_quiet(dense, capsys):
    sampled_windows(LlamaForCausalLM.from_pretrained(dense), 1024, 0, False)
    assert "Sampling" not in capsys.readouterr().err


def test_calibration_and_healing_say_what_there_is_to_do(tmp_path, dense, capsys):
    quick = {"calibrate": "self", "calibration_tokens": 1024, "calibration_steps": 2, "num_experts_per_sublayer": 4}
    convert_checkpoint(dense, tmp_path / "cut", **quick)
    said = capsys.readouterr().err
    assert "Calibrating on 1,024 tokens sampled from the dense model: 2 layers, 2 steps each; at least about" in said
    assert re.search(r"layer 0: relative error .*; about \d+ s left", said)
    assert said.index("Calibrating on") < said.index("Sampling: ") < said.index("layer 0")
    heal(tmp_path / "cut", tmp_path / "out", teacher=str(dense), tokens=1024, context=32, steps=12, batch_size=4)
    said = capsys.readouterr().err
    assert "Healing on 1,024 tokens sampled from the teacher: 12 steps of 4 x 32 tokens, 1,536 in all; at least" in said
    assert re.search(r"Healing: step \d+ of 12, about \d+ s left", said)


@pytest.mark.parametrize(("seconds", "words"), [(40, "about 40 s"), (200, "about 3 min"), (9000, "about 2.5 h")])
def test_times_in_words(seconds, words):
    assert in_words(seconds) == words
