"""Calibration in two processes, over gloo: what one process finds, to rounding."""

import json

import pytest
import torch
from conftest import make_dense
from finedeep.convert import convert_checkpoint
from finedeep.convert.calibrate.sharing import Share
from finedeep.convert.receipt import RECEIPT
from forked import run_command
from transformers import AutoModelForCausalLM

# One window is held out: the second process has none.
OPTIONS = {
    "calibration_tokens": 2048,
    "calibration_steps": 4,
    "num_expert_sublayers": 2,
    "num_experts_per_sublayer": 4,
}


def test_windows_are_dealt_out_once(monkeypatch):
    windows, found = torch.arange(7 * 4).view(7, 4), []
    for process in range(3):
        monkeypatch.setenv("RANK", str(process))
        monkeypatch.setenv("WORLD_SIZE", "3")
        share = Share(windows, 2)
        mine = share.windows.flatten()
        assert torch.equal(mine[: share.held], mine[mine < 8])  # held out are the first two windows
        assert torch.equal(mine[: share.of_the_first(12)], mine[mine < 12])
        batch = torch.tensor([27, 3, 9, 16])
        assert set(mine[share.of_batch(batch)].tolist()) == set(mine.tolist()) & set(batch.tolist())
        found.append(mine)
    assert torch.equal(torch.cat(found).sort().values, windows.flatten())


@pytest.mark.parametrize("source", ["self", pytest.param("text", marks=pytest.mark.slow)])
def test_two_processes_find_what_one_does(tmp_path, source):
    dense = make_dense(tmp_path / "dense")
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + (i * i + i // 7) % 26) for i in range(4000)))
    calibrate = "self" if source == "self" else str(text)
    convert_checkpoint(dense, tmp_path / "one", calibrate=calibrate, progress=False, **OPTIONS)
    words = ["convert", str(dense), str(tmp_path / "two"), "--calibrate", calibrate, "--sublayers", "2"]
    words += ["--experts", "4", "--calibration-tokens", "2048", "--calibration-steps", "4"]
    first, second = run_command(words, processes=2)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "M=2 sub-layers" in first.stdout
    assert second.stdout == ""
    one, two = (json.loads((tmp_path / name / RECEIPT).read_text())["calibration"] for name in ("one", "two"))
    for before, after in zip(one["relative_errors"], two["relative_errors"], strict=True):
        assert after == pytest.approx(before, rel=2e-2)
    ids = torch.randint(256, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()(ids).logits for name in ("one", "two")]
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3 * logits[0].std().item())
