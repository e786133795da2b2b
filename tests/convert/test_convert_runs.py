"""A conversion's course: plan, receipt, assignment, growth, precision, resumption, death at any moment."""

import errno
import json
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import make_dense
from finedeep.convert import ConversionError, conversion, convert_checkpoint, register_assignment
from finedeep.convert.assignment import ASSIGNMENTS, balanced_clusters
from finedeep.convert.calibrate.run import Calibration
from finedeep.convert.conversion import plan_conversion
from finedeep.convert.plan import Options
from finedeep.convert.receipt import RECEIPT
from finedeep_cli import argument_types, convert_command, main
from finedeep_files.hashing import sha256
from finedeep_files.working_folder import Contents, WorkingFolder
from forked import FORKS
from safetensors.torch import load_file, save_file
from test_convert import assert_same_logits, fingerprint, load
from transformers import AutoModelForCausalLM, LlamaForCausalLM

SMALL_SHARDS = {"num_expert_sublayers": 2, "max_shard_size": "20KB", "progress": False}


def convert(dense, out, **options):
    return convert_checkpoint(dense, out, **{"num_expert_sublayers": 2, "progress": False, **options})


# --- plan and receipt ------------------------------------------------------------------------------------------------


def all_layers(name):
    return re.sub(r"^model\.layers\.\d+", "model.layers.{0..1}", name)


def test_the_plan_names_every_tensor_and_writes_nothing(tmp_path, capsys, dense):
    before = fingerprint(tmp_path)
    assert main(["convert", str(dense), str(tmp_path / "out"), "--sublayers", "2", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert fingerprint(tmp_path) == before
    convert(dense, tmp_path / "out")
    for name, tensor in load_file(tmp_path / "out/model.safetensors").items():
        pattern = all_layers(name)
        shape = "x".join(map(str, tensor.shape))
        assert f"\n{pattern} [{shape} float32]" in text
    for source in load_file(dense / "model.safetensors"):
        assert f"<- {all_layers(source)} (" in text
    assert "4 of them zero padding" in text
    parameters = sum(p.numel() for p in load(tmp_path / "out").parameters())
    assert f"-> {parameters:,} (" in text


def test_help_agrees_with_the_options():
    parser = convert_command.argparse.ArgumentParser()
    convert_command.add_arguments(parser)
    given = vars(parser.parse_args(["source", "destination"]))
    assert Options(**{name: given[name] for name in vars(Options())}) == Options()
    assert set(argument_types.ASSIGNMENTS) <= set(ASSIGNMENTS)


def test_the_receipt_makes_the_same_bytes_again(tmp_path, dense):
    options = {"num_expert_sublayers": 2, "num_experts_per_sublayer": 3, "assignment": "random", "seed": 7}
    convert(dense, tmp_path / "one", max_shard_size="30KB", **options)
    receipt = json.loads((tmp_path / "one" / RECEIPT).read_text())
    convert(dense, tmp_path / "two", **receipt["options"])
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "two")
    assert receipt["source"]["sha256"] == {"model.safetensors": sha256(dense / "model.safetensors")}
    assert receipt["versions"]["torch"] == torch.__version__
    convert(dense, tmp_path / "three", **{**receipt["options"], "seed": 8})
    assert fingerprint(tmp_path / "one") != fingerprint(tmp_path / "three")


# --- assignment ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("assignment", list(ASSIGNMENTS))
def test_every_assignment_is_exact_with_one_sublayer(tmp_path, dense, assignment):
    (tmp_path / "text.txt").write_text("Once upon a time there was a text. " * 20)
    texts = {"activity": "text", "nonlinearity": "calibrate"}
    text = {texts[assignment]: str(tmp_path / "text.txt")} if assignment in texts else {}
    convert(dense, tmp_path / "out", num_expert_sublayers=1, assignment=assignment, **text)
    assert_same_logits(dense, tmp_path / "out")
    gates = [load_file(folder / "model.safetensors") for folder in (dense, tmp_path / "out")]
    same = torch.equal(
        gates[0]["model.layers.0.mlp.gate_proj.weight"][:5], gates[1]["model.layers.0.sublayers.0.gate_proj.weight"][:5]
    )
    assert same == (
        assignment in ("contiguous", "nonlinearity")
    )  # the last is not measured where nothing depends on it


def test_no_file_beside_the_weights_looks_like_weights(tmp_path, dense):
    """vLLM and others load every *.safetensors where there is no index."""
    convert(dense, tmp_path / "out", assignment="clusters", num_expert_sublayers=2)
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]


def test_the_memory_of_a_whole_model_is_told_of(tmp_path):
    """Measured by activity, in its own dtype; sampled from, in float32 on a CPU."""
    dense = make_dense(tmp_path / "dense", dtype=torch.bfloat16, num_hidden_layers=64)
    parameters = sum(p.numel() for p in LlamaForCausalLM.from_pretrained(dense).parameters())
    assert plan_conversion(dense).memory < parameters
    assert plan_conversion(dense, assignment="activity", text="text.txt").memory == 2 * parameters
    assert (
        plan_conversion(dense, num_expert_sublayers=2, calibrate="self", calibration_tokens=1000).memory
        == 4 * parameters
    )


def test_activity_puts_the_most_active_neurons_first(tmp_path, dense):
    """Against a plain hook on the dense model, over the same text."""
    (tmp_path / "text.txt").write_text("A text of which some neurons are fond. " * 10)
    convert(dense, tmp_path / "out", assignment="activity", text=str(tmp_path / "text.txt"))
    model = LlamaForCausalLM.from_pretrained(dense)
    seen = []
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda m, inputs, out: seen.append(inputs[0].detach()))
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(dense)((tmp_path / "text.txt").read_text(), return_tensors="pt")["input_ids"]
    for window in ids.split(128, dim=1):
        model(window)
    most = torch.cat(seen, dim=1)[0].abs().mean(0).argmax()
    gate = load_file(dense / "model.safetensors")["model.layers.1.mlp.gate_proj.weight"]
    first = load_file(tmp_path / "out/model.safetensors")["model.layers.1.sublayers.0.gate_proj.weight"]
    assert torch.equal(first[0], gate[most])


def test_clusters_are_of_equal_size_and_find_what_is_there():
    """Neurons that point in four directions, shuffled: each cluster is one direction."""
    draw = torch.Generator().manual_seed(0)
    directions = torch.eye(8)[:4].repeat_interleave(10, 0)
    shuffled = torch.randperm(40, generator=draw)
    vectors = directions[shuffled] * 3 + 0.1 * torch.randn(40, 8, generator=draw)
    found = [balanced_clusters(vectors, 4, torch.Generator().manual_seed(seed)).view(4, 10) for seed in range(5)]
    pure = [all(len(set((shuffled[group] // 10).tolist())) == 1 for group in order) for order in found]
    assert any(pure)  # k-means may end in a poorer place from some starts
    for order in found:
        assert sorted(order.flatten().tolist()) == list(range(40))


def test_a_users_own_assignment(tmp_path, dense):
    try:
        register_assignment("backwards")(lambda layer: torch.arange(layer.width).flip(0))
        convert(dense, tmp_path / "out", num_expert_sublayers=1, assignment="backwards")
        assert_same_logits(dense, tmp_path / "out")
        register_assignment("half")(lambda layer: torch.arange(layer.width) // 2)
        with pytest.raises(ConversionError, match="'half' gave layer 0 an order"):
            convert(dense, tmp_path / "wrong", assignment="half")
    finally:
        ASSIGNMENTS.pop("backwards", None)
        ASSIGNMENTS.pop("half", None)
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"assignment": "by magic"}, "'by magic' is not known"),
        ({"assignment": "activity"}, "measures on a text"),
        ({"mode": "shrink"}, "mode='shrink' is not known"),
        ({"dtype": "int8"}, "dtype='int8' is not known"),
        ({"max_shard_size": "five"}, "max_shard_size='five' is not a size"),
        ({"assignment": "activity", "text": "/no/such/text"}, "cannot be read as UTF-8 text"),
    ],
    ids=str,
)
def test_options_that_cannot_be_met(tmp_path, dense, options, words):
    with pytest.raises(ConversionError, match=words):
        convert(dense, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


# --- growth and precision --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("M", [2, 4])
def test_grown_models_give_the_dense_logits_and_can_learn(tmp_path, M):
    dense = make_dense(tmp_path / "dense", mlp_bias=True)
    done = convert(dense, tmp_path / "out", num_expert_sublayers=M, num_experts_per_sublayer=4, mode="grow")
    assert done.exact
    assert done.finedeep_parameters > done.dense_parameters
    assert_same_logits(dense, tmp_path / "out")
    model = load(tmp_path / "out")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    ids = torch.arange(60).view(2, 30)
    for step in range(2):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        new = [sublayer for layer in model.model.layers for sublayer in list(layer.sublayers)[1:]]
        assert all(sublayer.down_proj.weight.grad.abs().max() > 0 for sublayer in new)
        if step:  # once W_down has moved, everything behind it learns
            assert all(sublayer.gate_proj.weight.grad.abs().max() > 0 for sublayer in new)
            assert all(sublayer.router.grad.abs().max() > 0 for sublayer in new)
        optimizer.step()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_weights_are_cast_on_request(tmp_path, dense, dtype):
    convert(dense, tmp_path / "out", num_expert_sublayers=1, dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == getattr(torch, dtype)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out/model.safetensors").values()} == {model.dtype}


def test_what_does_not_fit_into_float16_is_refused(tmp_path):
    dense = make_dense(tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e6

    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"model.norm.weight has values up to 1e\+06"):
        convert(dense, tmp_path / "out", dtype="float16")


# --- death and resumption --------------------------------------------------------------------------------------------


def interrupted(dense, out, after_shards, **options):
    """Convert until so many shards are there, then Ctrl-C, as it were."""
    from finedeep_files import shards

    made = []

    class Interrupting(shards.ShardWriter):
        def finish(self):
            super().finish()
            made.append(self.path)
            if len(made) == after_shards:
                raise KeyboardInterrupt

    original, shards.ShardWriter = shards.ShardWriter, Interrupting
    try:
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(dense, out, **{**SMALL_SHARDS, **options})
    finally:
        shards.ShardWriter = original


def test_resume_does_not_redo_finished_shards(tmp_path, dense):
    out = tmp_path / "out"
    interrupted(dense, out, 3)
    assert not out.exists()
    left = {path.name: path.stat() for path in WorkingFolder(out).result.glob("*.safetensors")}
    assert len(left) == 3
    convert_checkpoint(dense, out, resume=True, **SMALL_SHARDS)
    for name, before in left.items():
        after = (out / name).stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    convert_checkpoint(dense, tmp_path / "at once", **SMALL_SHARDS)
    assert fingerprint(out) == fingerprint(tmp_path / "at once")


def test_a_stopped_run_is_started_again_where_that_is_said(tmp_path, dense):
    interrupted(dense, tmp_path / "out", 2)
    with pytest.raises(ConversionError, match="--resume continues from it, --overwrite starts again"):
        convert_checkpoint(dense, tmp_path / "out", **SMALL_SHARDS)
    convert_checkpoint(dense, tmp_path / "out", overwrite=True, **SMALL_SHARDS)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert_same_logits(dense, convert(dense, tmp_path / "exact", num_expert_sublayers=1).folder)


def test_an_interruption_before_the_first_shard_leaves_nothing(tmp_path, dense, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("finedeep.convert.conversion.assign", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(dense, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_after_an_interruption_no_further_file_is_hashed(tmp_path, monkeypatch):
    dense = make_dense(tmp_path / "dense", shard_size="20KB")
    hashed = []

    def slowly(path):
        hashed.append(path)
        time.sleep(0.2)
        return ""

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("finedeep.convert.conversion.sha256", slowly)
    monkeypatch.setattr("finedeep.convert.conversion.assign", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(dense, tmp_path / "out")
    assert len(hashed) <= 1 < len(list(dense.glob("*.safetensors")))


def test_resume_is_of_the_same_conversion_only(tmp_path, dense):
    interrupted(dense, tmp_path / "out", 2)
    with pytest.raises(ConversionError, match=r"another one: .*options.* differ"):
        convert_checkpoint(dense, tmp_path / "out", resume=True, **{**SMALL_SHARDS, "seed": 1})
    convert_checkpoint(dense, tmp_path / "out", resume=True, **SMALL_SHARDS)


def calibrating(folder):
    (folder / "text.txt").write_text("There was a text. It was not long. " * 200)
    text = str(folder / "text.txt")
    return {**SMALL_SHARDS, "calibrate": text, "calibration_tokens": 2000, "calibration_steps": 2}


@pytest.mark.parametrize(
    ("changed", "into"), [("versions", lambda: {"torch": "3.0.0"}), ("best_device", lambda: torch.device("meta"))]
)
def test_resume_is_of_the_same_versions_and_device(tmp_path, dense, monkeypatch, changed, into):
    """The receipt names one of each for all layers."""
    options = calibrating(tmp_path)
    interrupted(dense, tmp_path / "out", 1, **options)
    monkeypatch.setattr(conversion, changed, into)
    with pytest.raises(ConversionError, match=f"another one: {changed.removeprefix('best_')} differ"):
        convert_checkpoint(dense, tmp_path / "out", resume=True, **options)


def test_a_place_that_was_taken_meanwhile_costs_nothing(tmp_path, dense, monkeypatch):
    """Neither what was made nor, when the place is free again, the calibration of a single layer."""
    options, out = calibrating(tmp_path), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "write_receipt", lambda *_: (out.mkdir(), (out / "other.txt").touch()))
        with pytest.raises(ConversionError, match=r"not empty.* What was made is whole, in .*\.out\.unfinished"):
            convert_checkpoint(dense, out, **options)
    (out / "other.txt").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Calibration, "_best_stage", lambda *_: pytest.fail("calibrated again"))
        convert_checkpoint(dense, out, resume=True, **options)
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]
    convert_checkpoint(dense, tmp_path / "at once", **options)
    assert fingerprint(out) == fingerprint(tmp_path / "at once")


def test_measured_neurons_stay_where_finished_shards_have_them(tmp_path, dense, monkeypatch):
    """Measured again by a resumed run, they may come out in another order."""
    (tmp_path / "text.txt").write_text("A text of which some neurons are fond. " * 10)
    options = {**SMALL_SHARDS, "assignment": "activity", "text": str(tmp_path / "text.txt")}
    interrupted(dense, tmp_path / "out", 3, **options)
    with monkeypatch.context() as patch:
        measure = "finedeep.convert.calibrate.neuron_statistics.mean_activity"
        patch.setattr(measure, lambda *_: pytest.fail("measured again"))
        convert_checkpoint(dense, tmp_path / "out", resume=True, **options)
    convert_checkpoint(dense, tmp_path / "at once", **options)
    assert fingerprint(tmp_path / "out") == fingerprint(tmp_path / "at once")
    interrupted(dense, tmp_path / "other", 3, **options)
    (tmp_path / "text.txt").write_text("Another one. " * 30)
    with pytest.raises(ConversionError, match="another one: assignment text differ"):
        convert_checkpoint(dense, tmp_path / "other", resume=True, **options)


def test_a_file_system_without_locks(tmp_path, dense, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("finedeep_files.lock.fcntl.flock", refuse)
    assert_same_logits(dense, convert(dense, tmp_path / "out", num_expert_sublayers=1).folder)


def test_two_runs_at_once_are_kept_apart(tmp_path, dense):
    with (
        WorkingFolder(tmp_path / "out").begun(Contents("convert", ()), {}),
        pytest.raises(ConversionError, match="another run is writing"),
    ):
        convert(dense, tmp_path / "out")


def _convert_in_child(dense, out, resume, started):
    torch.set_num_threads(1)
    started.set()
    convert_checkpoint(dense, out, resume=resume, **SMALL_SHARDS)


def killed_at(moment, dense, out, resume):
    """Convert in another process, which is killed after so many seconds. Returns whether it was still at work."""
    started = FORKS.Event()
    child = FORKS.Process(target=_convert_in_child, args=(dense, out, resume, started))
    child.start()
    assert started.wait(60)
    time.sleep(moment)
    child.kill()
    child.join()
    return child.exitcode == -signal.SIGKILL


def check_kills(tmp_path, dense, times):
    begin = time.monotonic()
    convert_checkpoint(dense, tmp_path / "whole", **SMALL_SHARDS)
    length = time.monotonic() - begin
    wanted = fingerprint(tmp_path / "whole")
    draw = random.Random(0)
    caught = 0
    for i in range(times):
        out = tmp_path / f"out{i}"
        resume = bool(i % 2)
        caught += killed_at(draw.uniform(0, 1.5 * length), dense, out, resume)
        if out.exists():
            assert fingerprint(out) == wanted
            continue
        convert_checkpoint(dense, out, resume=resume, overwrite=not resume, **SMALL_SHARDS)
        assert fingerprint(out) == wanted
        assert not WorkingFolder(out).path.exists()
    return caught


def test_killed_at_some_moments(tmp_path, dense):
    assert check_kills(tmp_path, dense, 4) >= 1


@pytest.mark.slow
def test_killed_at_twenty_random_moments(tmp_path, dense):
    assert check_kills(tmp_path, dense, 20) >= 10


INTERRUPTED = """
import os, signal, sys
from finedeep_files import shards
from finedeep_cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts without
finish = shards.ShardWriter.finish
def finish_and_interrupt(writer):
    finish(writer)
    shards.ShardWriter.finish = finish
    os.kill(os.getpid(), signal.SIGINT)
shards.ShardWriter.finish = finish_and_interrupt
sys.exit(main(sys.argv[1:]))
"""


def test_an_interrupted_command_says_how_to_go_on(tmp_path, dense):
    """Ctrl-C to a process of its own, once a shard is there."""
    words = ["convert", str(dense), str(tmp_path / "out"), "--max-shard-size", "20KB"]
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, *words], capture_output=True, text=True)
    errors = done.stderr
    assert done.returncode == 130
    assert errors.rstrip().splitlines()[-1].startswith("finedeep: interrupted. What is finished is kept in")
    assert "--resume continues" in errors
    assert "Traceback" not in errors
