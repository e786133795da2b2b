"""Healing: the loss is what it says, training lowers it, a stopped run continues, and what does not fit is refused."""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from conftest import make_dense
from finedeep import FinedeepConfig, FinedeepForCausalLM
from finedeep.convert import ConversionError, convert_checkpoint
from finedeep.convert.calibrate import text as calibration_text
from finedeep.convert.calibrate.text import sampled_windows
from finedeep.convert.heal import HealingOptions
from finedeep.convert.heal.data import ANOTHER_SEED, healing_windows
from finedeep.convert.heal.run import HEALING, HIDDEN_STATES, heal, settled
from finedeep.convert.heal.trainer import HealingTrainer, hidden_state_distance
from finedeep.convert.receipt import RECEIPT
from finedeep.modeling_finedeep import FinedeepDecoderLayer
from finedeep_cli import heal_command, main
from finedeep_files.working_folder import Contents, WorkingFolder
from hub_server import commit_id, running_hub
from safetensors.torch import load_file, save_file
from test_convert import fingerprint
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    TrainerCallback,
    TrainingArguments,
)

TESTS = Path(__file__).parents[1]
QUICK = {"tokens": 4096, "context": 32, "steps": 12, "batch_size": 4, "progress": False}


@pytest.fixture(scope="module")
def cut(dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut") / "cut"
    convert_checkpoint(dense, folder, num_expert_sublayers=2, num_experts_per_sublayer=4, progress=False)
    return folder


def text_in(folder, length=6000):
    path = folder / "text.txt"
    path.write_text(("There was a text. It was not long. " * (length // 30))[:length], encoding="utf-8")
    return path


@pytest.mark.parametrize("divergence", [0.0, 0.25, 1.0])
def test_the_loss_is_the_mix_that_it_says(tmp_path, dense, cut, divergence):
    """Against Llama's own loss and SciPy's relative entropy."""
    from scipy.special import rel_entr

    student, teacher = FinedeepForCausalLM.from_pretrained(cut), LlamaForCausalLM.from_pretrained(dense)
    ids = torch.randint(256, (3, 20), generator=torch.Generator().manual_seed(0))
    trainer = HealingTrainer(
        teacher=teacher,
        divergence=divergence,
        model=student,
        args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"),
    )
    found = trainer.compute_loss(student, {"input_ids": ids}).item()
    with torch.no_grad():
        own = student(ids, labels=ids).loss.item()
        p, q = (model(ids).logits.double().softmax(-1).numpy() for model in (teacher, student))
    assert found == pytest.approx((1 - divergence) * own + divergence * rel_entr(p, q).sum(-1).mean(), rel=1e-4)


@pytest.mark.parametrize(("step", "training", "weight"), [(0, True, 2.0), (30, True, 0.5), (0, False, 0.0)])
def test_hidden_states_pull_less_and_less_and_only_in_training(tmp_path, dense, cut, step, training, weight):
    """Values and gradients, against plain loops over what hooks on the layers, and on the last one's norm, see."""
    student, teacher = FinedeepForCausalLM.from_pretrained(cut), LlamaForCausalLM.from_pretrained(dense)
    ids = torch.randint(256, (3, 20), generator=torch.Generator().manual_seed(0))
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    losses = []
    for hidden_states in (0.0, 2.0):
        trainer = HealingTrainer(
            teacher=teacher, divergence=1.0, hidden_states=hidden_states, model=student, args=arguments
        )
        trainer.state.global_step, trainer.state.max_steps = step, 40
        losses.append(trainer.compute_loss(student.train(training), {"input_ids": ids}))
    seen = {student: [], teacher: []}
    for model, outputs in seen.items():
        for layer in (*model.model.layers[:-1], model.model.norm):
            layer.register_forward_hook(lambda _, __, output, kept=outputs: kept.append(output))
        model(ids)
    distance = 0.0
    for h, wanted in zip(seen[student], seen[teacher], strict=True):
        for sequence in range(3):
            for token in range(20):
                off = h[sequence, token] - wanted[sequence, token].detach()
                distance = distance + off @ off / (wanted[sequence, token].detach().norm() ** 2 * 2 * 60)
    assert (losses[1] - losses[0]).item() == pytest.approx(weight * distance.item(), rel=1e-4, abs=1e-7)
    weights = student.model.layers[0].sublayers[0].gate_proj.weight
    found, expected = (torch.autograd.grad(x, weights)[0] for x in (losses[1] - losses[0], weight * distance))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * distance.item())


def test_hidden_states_that_checkpointing_cuts_off(tmp_path, dense, cut, monkeypatch):
    """What versions of transformers that checkpoint a whole layer, with use_reentrant=True, return."""
    student, teacher = FinedeepForCausalLM.from_pretrained(cut), LlamaForCausalLM.from_pretrained(dense)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = HealingTrainer(teacher=teacher, divergence=1.0, hidden_states=1.0, model=student, args=arguments)
    usual = FinedeepDecoderLayer.forward
    monkeypatch.setattr(FinedeepDecoderLayer, "forward", lambda *given, **named: usual(*given, **named).detach())
    student.model.embed_tokens.requires_grad_(False)
    with pytest.raises(ConversionError, match="use_reentrant=true cuts hidden states off"):
        trainer.compute_loss(student.train(), {"input_ids": torch.arange(40).view(2, 20)})


def test_a_token_whose_states_are_zero():
    """As a padding token's may be: its distance is finite, and so are the others'."""
    wanted, h = torch.ones(2, 3, 4), torch.full((2, 3, 4), 1.5)
    wanted[0, 0] = 0.0
    found = hidden_state_distance([h, h, h], [wanted, wanted, wanted])
    assert found.item() == pytest.approx((5 * 0.25 + 4 * 1.5**2 / (1e-4 * 4 * 5 / 6)) / 6)


def test_hidden_states_of_another_shape(tmp_path, cut):
    """They are left alone, unless they were asked for."""
    make_dense(tmp_path / "other", num_hidden_layers=3)
    with pytest.raises(ConversionError, match=r"has 3 layers of size 32 and the model 2 of 32.*hidden_states=0 goes"):
        heal(cut, tmp_path / "out", teacher=str(tmp_path / "other"), **QUICK, hidden_states=1.0)
    assert not (tmp_path / ".out.unfinished").exists()
    heal(cut, tmp_path / "out", teacher=str(tmp_path / "other"), **{**QUICK, "steps": 1})
    assert json.loads((tmp_path / "out" / HEALING).read_text())["options"]["hidden_states"] == 0.0


def test_healing_brings_the_model_nearer(tmp_path, dense, cut, capsys):
    out = tmp_path / "healed"
    arguments = ["heal", str(cut), str(out), "--teacher", str(dense), "--context", "32", "--steps", "100"]
    arguments += ["--tokens", "16384", "--batch-size", "16", "--learning-rate", "0.01"]
    assert main([*arguments, "--set", "eval_strategy=steps", "--set", "eval_steps=50"]) == 0
    assert "KL from the teacher" in capsys.readouterr().out
    receipt = json.loads((out / HEALING).read_text())
    before, after = (receipt["held_out_nats_per_token"][when]["divergence"] for when in ("before", "after"))
    assert after < 0.7 * before
    curve = {entry["step"]: entry["eval_divergence"] for entry in receipt["log"] if "eval_divergence" in entry}
    assert list(curve) == [0, 50, 100]
    assert (curve[0], curve[100]) == (before, after)
    assert after < curve[50] < before
    assert receipt["tokens_seen"] == 100 * 16 * 32
    assert receipt["options"]["hidden_states"] == HIDDEN_STATES
    assert [path.name for path in tmp_path.iterdir()] == ["healed"]
    names = {path.name for path in cut.iterdir()} | {HEALING}
    assert {path.name for path in out.iterdir()} == names
    AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)


def test_an_adapter_is_trained_in_the_place_of_the_weights_and_merged(tmp_path, dense, cut):
    out = tmp_path / "healed"
    done = heal(cut, out, teacher=str(dense), **{**QUICK, "steps": 40}, adapter_rank=4)
    assert done.after["divergence"] < 0.9 * done.before["divergence"]
    assert {path.name for path in out.iterdir()} == {path.name for path in cut.iterdir()} | {HEALING}
    before, after = (load_file(folder / "model.safetensors") for folder in (cut, out))
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "_proj" in name or "router" in name}
    for name in moved:
        singular = numpy.linalg.svd((after[name] - before[name]).double().numpy(), compute_uv=False)
        assert singular[4:].max(initial=0) < 1e-5 * singular[0]
    # The losses in the receipt are those of the merged weights.
    again = heal(out, tmp_path / "again", teacher=str(dense), **{**QUICK, "steps": 1}, adapter_rank=1)
    assert again.before == pytest.approx(done.after, rel=1e-4)


@pytest.mark.parametrize(
    ("hidden", "most", "expected"),
    [
        (64, 512, (524_288, 64, 640, 32)),  # stories260k: minutes on a CPU
        (256, 2048, (1_048_576, 256, 1000, 32)),
        (2048, 8192, (1_048_576, 512, 1000, 16)),
        (2048, 128, (1_048_576, 128, 1000, 64)),
        (8, 32, (65_536, 32, 500, 64)),
    ],
)
def test_how_much_there_is_to_do_follows_the_models_size(hidden, most, expected):
    config = FinedeepConfig(hidden_size=hidden, num_attention_heads=1, max_position_embeddings=most)
    o = settled(HealingOptions(), config, None)
    assert (o.tokens, o.context, o.steps, o.batch_size) == expected
    given = {"tokens": 5000, "context": 16, "steps": 7, "batch_size": 3}
    assert {name: getattr(settled(HealingOptions(**given), config, None), name) for name in given} == given


def test_help_agrees_with_the_options():
    parser = argparse.ArgumentParser()
    heal_command.add_arguments(parser)
    given = vars(parser.parse_args(["model", "destination"]))
    given["training"] = dict(given["training"])
    assert HealingOptions(**{name: given[name] for name in vars(HealingOptions())}) == HealingOptions()


@pytest.mark.parametrize(
    ("text", "value"), [("x=1", 1), ("x=true", True), ("x=False", False), ("x=a b", "a b"), ("x=", "")]
)
def test_values_are_json_or_pythons_or_text(text, value):
    parser = argparse.ArgumentParser()
    heal_command.add_arguments(parser)
    assert parser.parse_args(["m", "d", "--set", text]).training == [("x", value)]


def test_a_tied_model_stays_tied(tmp_path):
    make_dense(tmp_path / "dense", tie_word_embeddings=True)
    convert_checkpoint(
        tmp_path / "dense",
        tmp_path / "cut",
        num_expert_sublayers=2,
        num_experts_per_sublayer=4,
        dtype="bfloat16",
        progress=False,
    )
    heal(tmp_path / "cut", tmp_path / "out", teacher=str(tmp_path / "dense"), **{**QUICK, "steps": 1})
    names = [set(load_file(tmp_path / name / "model.safetensors")) for name in ("cut", "out")]
    assert names[0] == names[1]


def test_what_is_healed_is_exact_no_more(tmp_path, dense, converted):
    """The receipt of an exact conversion is not handed on as it is."""
    assert json.loads((converted / RECEIPT).read_text())["exact"]
    heal(converted, tmp_path / "out", teacher=str(dense), **{**QUICK, "steps": 1})
    receipt = json.loads((tmp_path / "out" / RECEIPT).read_text())
    assert not receipt["exact"]
    assert receipt["healing"] == HEALING


def test_the_context_is_the_models_at_most(tmp_path, dense, cut):
    done = heal(cut, tmp_path / "out", teacher=str(dense), **{**QUICK, "context": 4096, "steps": 1})
    assert done.tokens_seen == 4 * 128


def test_without_a_teacher_the_next_token_is_learnt(tmp_path, cut):
    done = heal(cut, tmp_path / "out", data=str(text_in(tmp_path)), **{**QUICK, "steps": 40, "learning_rate": 0.01})
    assert set(done.before) == {"next_token"}
    assert done.after["next_token"] < 0.8 * done.before["next_token"]


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_the_dtype_is_kept(tmp_path, dense, dtype):
    """The stored one as the file's, and config.json's, which may be another, as the configuration's."""
    convert_checkpoint(
        dense, tmp_path / "cut", num_expert_sublayers=2, num_experts_per_sublayer=4, dtype="bfloat16", progress=False
    )
    path = tmp_path / "cut/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "float32"}))
    heal(tmp_path / "cut", tmp_path / "out", teacher=str(dense), **{**QUICK, "steps": 2})
    assert {tensor.dtype for tensor in load_file(tmp_path / "out/model.safetensors").values()} == {dtype}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float32"


class Stop(TrainerCallback):
    def on_step_end(self, arguments, state, control, **kwargs):
        if state.global_step == 7:
            raise KeyboardInterrupt


@pytest.mark.parametrize("rank", [0, 4])
def test_a_stopped_run_goes_on(tmp_path, dense, cut, monkeypatch, rank):
    options = {**QUICK, "teacher": str(dense), "training": {"save_steps": 3}, "adapter_rank": rank}
    with monkeypatch.context() as patch:
        train = HealingTrainer.train
        patch.setattr(HealingTrainer, "train", lambda self, **kw: (self.add_callback(Stop), train(self, **kw)))
        with pytest.raises(KeyboardInterrupt):
            heal(cut, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.unfinished/training/checkpoint-6").is_dir()
    with pytest.raises(ConversionError, match="--resume continues from it, --overwrite starts again"):
        heal(cut, tmp_path / "out", **options)
    with pytest.raises(ConversionError, match="steps differ"):
        heal(cut, tmp_path / "out", resume=True, **{**options, "steps": 13})
    plan = tmp_path / ".out.unfinished/plan.json"
    plan.write_text(plan.read_text().replace('"processes": 1', '"processes": 2'))
    with pytest.raises(ConversionError, match="processes differ"):
        heal(cut, tmp_path / "out", resume=True, **options)
    plan.write_text(plan.read_text().replace('"processes": 2', '"processes": 1'))
    # As one leaves it that was killed while it wrote a checkpoint.
    shutil.copytree(
        tmp_path / ".out.unfinished/training/checkpoint-6", tmp_path / ".out.unfinished/training/checkpoint-9"
    )
    state = tmp_path / ".out.unfinished/training/checkpoint-9/trainer_state.json"
    state.write_text(state.read_text()[:100]) if rank else state.unlink()
    resumed = heal(cut, tmp_path / "out", resume=True, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    at_once = heal(cut, tmp_path / "at once", **options)
    assert resumed.before == at_once.before
    for name, tensor in load_file(tmp_path / "at once/model.safetensors").items():
        torch.testing.assert_close(load_file(tmp_path / "out/model.safetensors")[name], tensor, rtol=0, atol=1e-6)


def test_what_was_sampled_of_a_text_is_not_sampled_again(tmp_path, dense, cut, monkeypatch):
    monkeypatch.setattr(calibration_text, "AT_A_TIME", 10)
    options = {**QUICK, "steps": 1, "teacher": str(dense)}
    at_once = heal(cut, tmp_path / "at once", **options)
    generate, seen = calibration_text._generate, []

    def interrupted(*given, **named):
        seen.append(given)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return generate(*given, **named)

    monkeypatch.setattr(calibration_text, "_generate", interrupted)
    with pytest.raises(KeyboardInterrupt, match="--resume continues"):
        heal(cut, tmp_path / "out", **options)
    assert {path.name for path in (tmp_path / ".out.unfinished").glob("s*")} == {
        "sampled-0.safetensors", "sampled-1.safetensors",
    }  # fmt: skip
    resumed = heal(cut, tmp_path / "out", **options, resume=True)
    assert len(seen) == 3 + math.ceil(QUICK["tokens"] / 4 / QUICK["context"] / 10) - 2
    assert resumed.after == at_once.after
    assert {path.name for path in tmp_path.iterdir()} == {"at once", "out"}


def test_what_was_prepared_from_another_text_is_not_gone_on_with(tmp_path, cut, monkeypatch):
    """A run that stopped before its first checkpoint, and whose text has changed since."""
    options = {**QUICK, "data": str(text_in(tmp_path)), "steps": 1}
    with monkeypatch.context() as patch:
        patch.setattr(HealingTrainer, "train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr(WorkingFolder, "_leave", lambda *_: None)  # as if it were killed
        with pytest.raises(KeyboardInterrupt):
            heal(cut, tmp_path / "out", **options)
    windows = load_file(tmp_path / ".out.unfinished/windows.safetensors")["windows"]
    Path(options["data"]).write_text("Another one. " * 500)
    seen = []
    monkeypatch.setattr(HealingTrainer, "__init__", lambda self, **kw: seen.append(kw["train_dataset"]))
    with pytest.raises(AttributeError):
        heal(cut, tmp_path / "out", **options)
    assert not any(torch.equal(found["input_ids"], window) for found in seen[0] for window in windows)


def test_any_field_of_training_arguments(tmp_path, dense, cut):
    """Compiled models name their weights otherwise."""
    model = shutil.copytree(cut, tmp_path / "model")
    settings = {"temperature": 0.6, "top_p": 0.9, "_from_model_config": False}  # without do_sample: refused when saved
    (model / "generation_config.json").write_text(json.dumps(settings))
    training = {"torch_compile": True, "torch_compile_backend": "eager"}
    done = heal(model, tmp_path / "out", teacher=str(dense), **{**QUICK, "steps": 2}, training=training)
    assert set(done.before) == {"next_token", "divergence"}
    before, after = (load_file(folder / "model.safetensors") for folder in (cut, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == settings


@pytest.mark.parametrize("field", ["bf16_full_eval", "eval_on_start", "output_dir"])
def test_fields_that_are_healings_own(tmp_path, dense, cut, field):
    """The first would round the weights that are saved."""
    with pytest.raises(ConversionError, match=f"{field}: healing sets it itself"):
        heal(cut, tmp_path / "out", teacher=str(dense), **QUICK, training={field: True})
    assert not list(tmp_path.iterdir())


def test_tokens_that_were_seen_are_counted(tmp_path, cut):
    """The last batch of an epoch is a smaller one: 19 windows, 16 at a time."""
    options = {**QUICK, "batch_size": 16, "steps": 4, "tokens": 20 * 32}
    done = heal(cut, tmp_path / "out", data=str(text_in(tmp_path)), **options)
    assert done.tokens_seen == 2 * 19 * 32


def test_the_rate_goes_by_the_width(tmp_path, cut):
    heal(cut, tmp_path / "out", data=str(text_in(tmp_path)), **{**QUICK, "steps": 1})
    receipt = json.loads((tmp_path / "out" / HEALING).read_text())
    assert receipt["options"]["learning_rate"] == 0.064 / 32
    heal(cut, tmp_path / "lora", data=str(text_in(tmp_path)), **{**QUICK, "steps": 1}, adapter_rank=2)
    receipt = json.loads((tmp_path / "lora" / HEALING).read_text())
    assert receipt["options"]["learning_rate"] == 0.64 / 32


def test_what_has_become_worse_is_told_of(tmp_path, dense, cut, capsys):
    arguments = ["heal", str(cut), str(tmp_path / "out"), "--teacher", str(dense), "--learning-rate", "1"]
    assert main([*arguments, "--tokens", "4096", "--context", "32", "--steps", "3", "--batch-size", "4"]) == 0
    assert "worse than before: try a lower --learning-rate" in capsys.readouterr().err


def test_two_runs_at_once_are_kept_apart(tmp_path, dense, cut):
    """The second, of other options, would have removed what the first is at work on."""
    with WorkingFolder(tmp_path / "out").begun(Contents("heal", (), private=("windows.safetensors",)), {}):
        left = tmp_path / ".out.unfinished/windows.safetensors"
        left.write_bytes(b"the first one's")
        with pytest.raises(ConversionError, match="another run is writing"):
            heal(cut, tmp_path / "out", teacher=str(dense), **QUICK)
        assert left.read_bytes() == b"the first one's"


@pytest.mark.parametrize("which", ["model", "teacher"])
def test_pickled_weights_are_not_loaded(tmp_path, dense, cut, which):
    folders = {name: shutil.copytree(folder, tmp_path / name) for name, folder in (("model", cut), ("teacher", dense))}
    torch.save(load_file(folders[which] / "model.safetensors"), folders[which] / "pytorch_model.bin")
    (folders[which] / "model.safetensors").unlink()
    with pytest.raises(ConversionError, match=f"{folders[which]} (cannot be loaded|holds pickled weights)"):
        heal(folders["model"], tmp_path / "out", teacher=str(folders["teacher"]), **QUICK)
    assert {path.name for path in tmp_path.iterdir()} == set(folders)


def test_what_has_no_generation_config_gets_none(tmp_path, dense, cut):
    """Its own, of the training, would hide the EOS that config.json names."""
    model = shutil.copytree(cut, tmp_path / "model")
    (model / "generation_config.json").unlink(missing_ok=True)
    heal(model, tmp_path / "out", teacher=str(dense), **{**QUICK, "steps": 1})
    eos = [
        AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id
        for folder in (model, tmp_path / "out")
    ]
    assert eos == [257, 257]


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "finedeep_cli")
FSDP2 = (
    "accelerate.commands.launch",
    "--config_file",
    str(TESTS.parent / "examples/launch/fsdp2.yaml"),
    "--num_processes=2",
    "--mixed_precision=no",
    "--fsdp_cpu_ram_efficient_loading=false",
    str(TESTS / "processes/healed_fsdp2.py"),
)


ZERO3 = (
    "accelerate.commands.launch",
    "--config_file",
    str(TESTS.parent / "examples/launch/zero3.yaml"),
    "--num_processes=2",
    "--mixed_precision=no",
    str(TESTS / "processes/healed_zero3.py"),
)


@pytest.mark.slow  # two processes that import everything and train; tests/test_processes.py has faster ones
@pytest.mark.parametrize(
    ("launcher", "rank"),
    [(TORCHRUN, 0), (TORCHRUN, 4), (FSDP2, 0), (ZERO3, 0)],
    ids=["ddp", "ddp adapter", "fsdp2", "zero3"],
)
def test_two_processes(tmp_path, dense, cut, launcher, rank):
    """By the launcher: each process samples its share and sees its half of every batch, and one folder is written."""
    if launcher is ZERO3:
        pytest.importorskip("deepspeed")
    data = {"tokens": 32_800, "context": 8}  # 1,025 texts, in three batches
    words = [sys.executable, "-m", *launcher]
    words += ["heal", str(cut), str(tmp_path / "two"), "--teacher", str(dense), "--batch-size", "2", "--quiet"]
    words += ["--tokens", str(data["tokens"]), "--context", str(data["context"]), "--steps", "6"]
    quicker = {"per_device_eval_batch_size": 64}  # the 256 windows held out are a multiple
    words += ["--set", "per_device_eval_batch_size=64", "--adapter-rank", str(rank)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    receipt = json.loads((tmp_path / "two" / HEALING).read_text())
    assert receipt["tokens_seen"] == 6 * 2 * 2 * 8
    assert [path.name for path in tmp_path.iterdir()] == ["two"]
    options = {**QUICK, **data, "steps": 6, "adapter_rank": rank}
    one = heal(cut, tmp_path / "one", teacher=str(dense), **options, training=quicker)
    said = receipt["held_out_nats_per_token"]
    assert said["before"] == pytest.approx(one.before, rel=1e-5)
    assert said["after"] == pytest.approx(one.after, rel=1e-4)
    before = load_file(cut / "model.safetensors")
    alone, together = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, tensor in alone.items():
        moved = (tensor - before[name]).abs().max().item()
        torch.testing.assert_close(together[name], tensor, rtol=0, atol=0.05 * moved + 1e-6)


@pytest.mark.slow
def test_an_adapter_whose_weights_are_shared_out_is_refused(tmp_path, dense, cut):
    words = [sys.executable, "-m", *FSDP2, "heal", str(cut), str(tmp_path / "out"), "--teacher", str(dense)]
    words += ["--tokens", "2048", "--context", "8", "--steps", "2", "--adapter-rank", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode != 0
    assert "adapter_rank goes with one process" in done.stderr
    assert not (tmp_path / "out").exists()


# --- the data --------------------------------------------------------------------------------------------------------


def test_a_datasets_documents_are_packed(tmp_path, dense):
    """Read by `datasets`: documents one after the other, EOS between them."""
    pytest.importorskip("datasets")
    folder = tmp_path / "data"
    folder.mkdir()
    documents = [f"document {i}" for i in range(40)]
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": d, "n": 1}) + "\n" for d in documents))
    windows = healing_windows(str(folder), dense, 260, 16, 256, None, 0, False)
    assert windows.shape == (16, 16)
    assert (windows == 257).sum() > 10
    (folder / "train.jsonl").write_text(json.dumps({"words": "a", "n": 1}) + "\n")
    with pytest.raises(ConversionError, match="has columns words, n; it needs one called 'text'"):
        healing_windows(str(folder), dense, 260, 16, 256, None, 0, False)


@pytest.mark.parametrize(("context", "length"), [(16, 64), (32, 128), (48, 96), (128, 128)])
def test_short_windows_are_cut_from_longer_sampled_texts(dense, context, length):
    """So that most of them begin in the middle of one, as most windows of a real text do."""
    teacher = LlamaForCausalLM.from_pretrained(dense)
    windows = healing_windows("self", dense, 260, context, 1024, teacher, 3, False)
    texts = sampled_windows(teacher, 1024, 3 + ANOTHER_SEED, False, length)
    assert windows.shape[1] == context
    assert torch.equal(windows.view(texts.shape), texts)


def test_what_calibration_learnt_from_is_not_healed_on(dense):
    teacher = LlamaForCausalLM.from_pretrained(dense)
    learnt = sampled_windows(teacher, 4096, 3, False)
    windows = healing_windows("self", dense, 260, 128, 4096, teacher, 3, False)
    assert learnt.shape == windows.shape
    assert not {tuple(window) for window in learnt.tolist()} & {tuple(window) for window in windows.tolist()}


def test_a_texts_windows_are_its_own(tmp_path, dense):
    content = "".join(chr(ord("a") + i % 26) for i in range(2000))
    (tmp_path / "text.txt").write_text(content)
    from transformers import AutoTokenizer

    windows = healing_windows(str(tmp_path / "text.txt"), dense, 260, 20, 10_000, None, 0, False)
    assert len(windows) == 100
    assert all(AutoTokenizer.from_pretrained(dense).decode(window) in content for window in windows)


# --- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data": "self"}, "a teacher is needed to sample the text from"),
        ({"data": "text", "divergence": 0.5}, r"a teacher is needed for divergence=0\.5"),
        ({"teacher": "dense", "divergence": 2.0}, "is not between 0"),
        ({"data": "text", "hidden_states": 1.0}, r"a teacher is needed for hidden_states=1\.0"),
        ({"teacher": "dense", "hidden_states": -1.0}, r"hidden_states=-1\.0 is not a weight"),
        ({"teacher": "/no/such/teacher"}, "the teacher /no/such/teacher cannot be loaded"),
        ({"teacher": "dense", "data": "/no/such/text"}, "neither a text file nor a dataset that can be read"),
        ({"teacher": "dense", "steps": 0}, "steps=0 is not a whole number"),
        ({"teacher": "dense", "context": 1}, "context=1 is not a whole number of at least 2"),
        ({"teacher": "dense", "seed": 2**32}, f"seed={2**32} is not a whole number from 0 to {2**32 - 1}"),
        ({"teacher": "dense", "seed": 1.5}, r"seed=1\.5 is not a whole number"),
        ({"teacher": "dense", "training": {"learning_rate": 1.0}}, r"learning_rate: use .* --learning-rate "),
        ({"teacher": "dense", "training": {"max_steps": 1}}, r"max_steps: use .* --steps \(steps=\)"),
        ({"teacher": "dense", "training": {"num_train_epochs": 1}}, r"num_train_epochs: use .* --steps "),
        ({"teacher": "dense", "training": {"per_device_train_batch_size": 1}}, "use .* --batch-size "),
        ({"teacher": "dense", "training": {"seed": 1}}, "seed: use healing's own option for it, --seed "),
        ({"teacher": "dense", "training": {"label_smoothing_factor": 0.1}}, "label_smoothing_factor would have no eff"),
        ({"teacher": "dense", "training": {"learning_rat": 1.0}}, "learning_rat: no field of transformers' Training"),
        ({"teacher": "dense", "training": {"lr_scheduler_type": "up"}}, "TrainingArguments: "),
        ({"teacher": "dense", "data": "short"}, "gives 1 windows of 32 tokens; at least 2 are needed"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, dense, cut, options, words):
    texts = {"text": text_in(tmp_path), "short": tmp_path / "short.txt"}
    texts["short"].write_text("A text of fifty characters, all of them in vain....")
    names = {"dense": str(dense), **{name: str(path) for name, path in texts.items()}}
    options = {name: names.get(value, value) if isinstance(value, str) else value for name, value in options.items()}
    with pytest.raises(ConversionError, match=words):
        heal(cut, tmp_path / "out", **{**QUICK, **options})
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "short.txt"}


def test_a_model_that_has_diverged_is_not_saved(tmp_path, dense, cut):
    with pytest.raises(
        ConversionError, match=r"training has diverged.* lower than 1e\+30 is needed, and a new start \(--overwrite\)"
    ):
        heal(cut, tmp_path / "out", teacher=str(dense), **{**QUICK, "learning_rate": 1e30})
    assert not (tmp_path / "out").exists()


def test_one_process_with_several_devices(tmp_path, dense, cut, monkeypatch):
    """It would go through DataParallel, whose replicas do not give hidden states."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda _: 2))
    with pytest.raises(ConversionError, match=r"2 devices are seen by one process.*accelerate launch"):
        heal(cut, tmp_path / "out", teacher=str(dense), **QUICK)


def test_a_teacher_of_another_vocabulary(tmp_path, cut):
    make_dense(tmp_path / "other", vocab_size=300)
    with pytest.raises(ConversionError, match="has 300 tokens and the model 260"):
        heal(cut, tmp_path / "out", teacher=str(tmp_path / "other"), **QUICK)


def test_only_a_finedeep_model_is_healed(tmp_path, dense):
    with pytest.raises(ConversionError, match="has model_type 'llama'; a Finedeep checkpoint is needed"):
        heal(dense, tmp_path / "out", teacher=str(dense), **QUICK)
    with pytest.raises(ConversionError, match="does not exist"):
        heal(Path("/no/such/model"), tmp_path / "out", teacher=str(dense), **QUICK)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("num_expert_sublayers", 0, "config.json is no Finedeep configuration that works: num_expert_sublayers=0"),
        ("hidden_size", "wide", "config.json is no Finedeep configuration that works"),
        ("max_position_embeddings", 1, "max_position_embeddings=1; at least 2 are needed"),
    ],
)
def test_a_broken_configuration(tmp_path, dense, cut, field, value, words):
    model = shutil.copytree(cut, tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {field: value}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=words):
        heal(model, tmp_path / "out", teacher=str(dense), **QUICK)


def test_weights_that_lack_a_tensor_are_not_made_up(tmp_path, dense, cut):
    model = shutil.copytree(cut, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"has tensors that are missing: model\.norm\.weight"):
        heal(model, tmp_path / "out", teacher=str(dense), **QUICK)


def test_a_teacher_of_another_family(tmp_path, cut):
    """GPT-2, whose configuration has other names."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    GPT2LMHeadModel(GPT2Config(vocab_size=260, **sizes, bos_token_id=256, eos_token_id=257)).save_pretrained(
        tmp_path / "teacher"
    )
    done = heal(cut, tmp_path / "out", teacher=str(tmp_path / "teacher"), **{**QUICK, "steps": 1})
    assert set(done.after) == {"next_token", "divergence"}


@pytest.mark.slow
def test_models_of_the_hub(tmp_path, dense, cut):
    """Over real HTTP, model and teacher; no code is fetched."""
    with running_hub() as (hub, environment):
        for name, folder in (("org/cut", cut), ("org/dense", dense)):
            hub.repositories[name] = [{path.name: path.read_bytes() for path in folder.iterdir()}]
        environment = {**os.environ, **environment, "HF_HOME": str(tmp_path / "home")}
        words = [
            sys.executable,
            "-m",
            "finedeep_cli",
            "heal",
            "org/cut",
            str(tmp_path / "out"),
            "--teacher",
            "org/dense",
        ]
        words += ["--tokens", "4096", "--context", "32", "--steps", "2", "--quiet"]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert not [path for _, path in hub.requests if path.endswith(".py")]
    assert json.loads((tmp_path / "out" / HEALING).read_text())["teacher_revision"] == commit_id(0)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in cut.iterdir()} | {HEALING}


@pytest.mark.parametrize("value", ["nothing", "=1", "a b=1"])
def test_a_field_is_name_and_value(capsys, value):
    with pytest.raises(SystemExit):
        main(["heal", "a", "b", "--set", value])
    assert "is not NAME=VALUE" in capsys.readouterr().err


def test_a_source_with_a_folder_of_licences_and_a_finished_run_repeated(tmp_path, dense, cut, monkeypatch):
    """Copied, the folder made healing fail after all its training, and again on --resume."""
    model = shutil.copytree(cut, tmp_path / "model")
    (model / "LICENSES").mkdir()
    (model / "LICENSES/MIT.txt").write_text("Permission is hereby granted")
    (model / "LICENSE").write_text("MIT")
    options = {**QUICK, "steps": 2, "teacher": str(dense)}
    with monkeypatch.context() as patch:
        patch.setattr("finedeep.convert.heal.run._save", lambda *_: (_ for _ in ()).throw(RuntimeError("disk is gone")))
        with pytest.raises(RuntimeError, match="--resume continues from it, --overwrite starts again"):
            heal(model, tmp_path / "out", **options)
    with monkeypatch.context() as patch:
        patch.setattr(HealingTrainer, "training_step", lambda *_: pytest.fail("trained again"))
        heal(model, tmp_path / "out", resume=True, **options)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}
    assert (tmp_path / "out/LICENSE").read_text() == "MIT"
    receipt = json.loads((tmp_path / "out" / HEALING).read_text())
    assert receipt["files"] == sorted(path.name for path in (tmp_path / "out").iterdir())
    before = fingerprint(tmp_path)
    monkeypatch.setattr("finedeep.convert.heal.run.open_checkpoint", lambda *_: pytest.fail("looked for the model"))
    with pytest.raises(
        ConversionError, match=r"is not empty: it holds a finished run\. --overwrite replaces it; --resume is for"
    ):
        heal(model, tmp_path / "out", **options)
    with pytest.raises(ConversionError, match="is finished: there is nothing to resume"):
        heal(model, tmp_path / "out", resume=True, **options)
    assert fingerprint(tmp_path) == before


def test_an_optimiser_with_eight_bits_of_state(tmp_path, dense, cut):
    """From bitsandbytes, 2 bytes a parameter: its losses are AdamW's, to its rounding."""
    pytest.importorskip("bitsandbytes")
    options = {"teacher": str(dense), **QUICK}
    expected = heal(cut, tmp_path / "whole", **options).after
    found = heal(cut, tmp_path / "small", **options, training={"optim": "adamw_8bit"}).after
    assert found == pytest.approx(expected, rel=2e-2)
    assert found != expected
