"""The recipe for training from random weights: it learns, continues after a kill, and shares out its work."""

import copy
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
import yaml
from finedeep.demo.world import World
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
from pretrain import DONE, changed, pretrain  # noqa: E402

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The one that is shipped, made small."""
    folder = tmp_path_factory.mktemp("text")
    texts = World.from_seed(0).texts(0)
    for name, number in (("train", 1500), ("validation", 60)):
        (folder / f"{name}.txt").write_text("\n".join(islice(texts, number)))
    recipe = yaml.safe_load((ROOT / "examples/recipes/books-4m.yaml").read_text())
    recipe["tokenizer"]["vocabulary"] = 300
    recipe["data"] |= {"train": str(folder / "train.txt"), "validation": str(folder / "validation.txt")}
    recipe["data"] |= {"context": 32, "validation_sequences": 32}
    recipe["sizes"] |= SMALL | {"num_key_value_heads": 2}
    recipe["finedeep"] |= {"num_expert_sublayers": 2, "sublayer_output_norm": True}
    recipe["training"] |= {"max_steps": 60, "logging_steps": 10, "eval_steps": 20, "save_steps": 20, "warmup_steps": 6}
    recipe["training"] |= {"disable_tqdm": True, "learning_rate": 5e-3}
    return recipe


def with_fields(recipe, *changes):
    return changed(copy.deepcopy(recipe), changes)


def lines_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def curve(out):
    """(step, what, loss) of everything that was logged, in order, each once."""
    found = [(r["step"], n, r[n]) for r in lines_of(out) if "step" in r for n in ("loss", "eval_loss") if n in r]
    return list(dict.fromkeys(found))


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory):
    """Both kinds of model."""
    folder = tmp_path_factory.mktemp("trained")
    for model in ("llama", "finedeep"):
        pretrain(with_fields(recipe, f"model={model}"), folder / model)
    return folder


def test_both_kinds_learn_from_the_same_text_and_report_their_sizes(trained):
    first = {}
    for model in ("llama", "finedeep"):
        losses = [loss for _, name, loss in curve(trained / model) if name == "eval_loss"]
        assert losses[-1] < math.log(300) - 1.5
        assert losses == sorted(losses, reverse=True)
        first[model] = lines_of(trained / model)[0]
        loaded = AutoModelForCausalLM.from_pretrained(trained / model / "model")
        assert loaded.config.model_type == model
        assert loaded.num_parameters() == first[model]["parameters"]
        assert lines_of(trained / model)[-1]["tokens"] == 60 * 8 * 32
    # At a width of 32, routers and norms are some percent of the parameters; the products are the same.
    assert 1 < first["finedeep"]["parameters"] / first["llama"]["parameters"] < 1.08
    assert 1 <= first["finedeep"]["flops_per_token"] / first["llama"]["flops_per_token"] < 1.1
    tokenizers = {(trained / model / "tokenizer/tokenizer.json").read_text() for model in first}
    assert len(tokenizers) == 1


def test_a_finished_run_is_neither_trained_on_nor_logged_again(trained, recipe, capsys):
    """With another field too, such as more steps: what is there would be another run's."""
    out = trained / "finedeep"
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for changes in ((), ("training.max_steps=80",)):
        pretrain(with_fields(recipe, *changes), out)
        assert "model is finished" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_run_that_was_killed_after_its_last_step_takes_no_further_one(trained, recipe, tmp_path):
    out = shutil.copytree(trained / "finedeep", tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.rglob("model.safetensors")}, lines_of(out)
    shutil.rmtree(out / "model")
    (out / DONE).unlink()
    pretrain(with_fields(recipe), out)
    assert ({path.name: path.read_bytes() for path in out.rglob("model.safetensors")}, lines_of(out)) == before


def command(recipe, out, *launcher):
    out.parent.mkdir(exist_ok=True)
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    return [sys.executable, *launcher, str(ROOT / "examples/pretrain.py"), str(path), str(out)]


@pytest.mark.slow
def test_a_killed_run_has_the_losses_of_an_unbroken_one(tmp_path, recipe, trained):
    out = tmp_path / "out"
    words = command(recipe, out)
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        checkpoints = list(out.glob("checkpoint-*/trainer_state.json"))
        if checkpoints and any(line.get("step") == 30 for line in lines_of(out)):
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert not (out / "model").exists()
    (out / "checkpoint-99999").mkdir()  # as a kill in the writing of another would leave it
    pretrain(copy.deepcopy(recipe), out)
    resumed, whole = curve(out), curve(trained / "finedeep")
    assert [point[:2] for point in resumed] == [point[:2] for point in whole]
    assert [point[2] for point in resumed] == pytest.approx([point[2] for point in whole], rel=1e-4)


@pytest.mark.slow
def test_two_processes_train_on_the_same_tokens_as_one(tmp_path, recipe, trained):
    fields = with_fields(recipe, "training.per_device_train_batch_size=4", "training.max_steps=20")
    fields = with_fields(fields, "training.lr_scheduler_type=constant", "training.warmup_steps=0")
    words = command(fields, tmp_path / "two", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    pretrain(with_fields(fields, "training.per_device_train_batch_size=8"), tmp_path / "one")
    two, one = curve(tmp_path / "two"), curve(tmp_path / "one")
    assert [point[:2] for point in two] == [point[:2] for point in one]
    assert [point[2] for point in two] == pytest.approx([point[2] for point in one], rel=2e-3)
    assert lines_of(tmp_path / "two")[-1]["tokens"] == lines_of(tmp_path / "one")[-1]["tokens"]


def test_weights_can_be_begun_and_held_otherwise(tmp_path, recipe):
    fields = with_fields(recipe, "training.max_steps=2", "training.eval_steps=2", "freeze=[router]")
    fields = with_fields(fields, "initialise={router: {std: 0.5}, output_norm.weight: {value: 0.25}}")
    pretrain(fields, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
    routers = torch.cat([p.flatten() for name, p in model.named_parameters() if name.endswith("router")])
    assert routers.std().item() == pytest.approx(0.5, rel=0.2)  # and not trained: a step of AdamW would move them
    first = lines_of(tmp_path / "out")[0]
    assert first["parameters"] - first["trained"] == routers.numel()
    norms = [p for name, p in model.named_parameters() if name.endswith("output_norm.weight")]
    assert all((norm - 0.25).abs().max() < 0.02 for norm in norms)


def test_some_parameters_have_a_rate_of_their_own(tmp_path, recipe):
    """One step of Adam from the same weights moves everything by the rate, whatever the gradient."""
    same = ["training.max_steps=1", "training.eval_steps=1", "training.save_steps=5", "training.weight_decay=0"]
    same += ["training.lr_scheduler_type=constant", "training.warmup_steps=0", "training.learning_rate=0.001"]
    weights = {}
    changes = {"none": (), "slow": ["rates={router: 0.1, up_proj.weight: 0.5}"], "still": ["training.learning_rate=0"]}
    for name, more in changes.items():
        pretrain(with_fields(recipe, *same, *more), tmp_path / name)
        weights[name] = AutoModelForCausalLM.from_pretrained(tmp_path / name / "model").state_dict()
    for name, still in weights["still"].items():
        whole, slow = (float((weights[run][name] - still).abs().max()) for run in ("none", "slow"))
        factor = 0.1 if name.endswith("router") else 0.5 if name.endswith("up_proj.weight") else 1
        assert whole == pytest.approx(0.001, rel=0.05), name
        assert slow == pytest.approx(factor * whole, rel=0.05), name


@pytest.mark.parametrize("change", ["model", "nothing.here=1", "model.x=1"])
def test_a_change_of_no_field_is_refused(recipe, change):
    with pytest.raises(SystemExit, match=r"it must be A\.B=VALUE"):
        with_fields(recipe, change)


def test_a_parameter_that_is_not_there_is_named(tmp_path, recipe):
    with pytest.raises(SystemExit, match="LlamaForCausalLM has no parameter whose name ends with 'router'"):
        pretrain(with_fields(recipe, "model=llama", "freeze=[router]"), tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("data.train=null", "names no text as data.train: --set data.train=FILE"),
        ("data.validation=null", "names no text as data.validation"),
        ("data.validation={author: null}", r"names no text as data\.validation\.author"),
        ("data.train=/no/such/text.txt", "Unable to find /no/such/text.txt"),
        ("data.validation={a: /no/such/text.txt}", "Unable to find /no/such/text.txt"),
    ],
)
def test_texts_that_are_not_there(tmp_path, recipe, change, said):
    with pytest.raises(SystemExit, match=said):
        pretrain(with_fields(recipe, change), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_no_secret_is_logged(tmp_path, recipe):
    pretrain(with_fields(recipe, "training.hub_token=hf_abc", "training.max_steps=1"), tmp_path / "out")
    assert lines_of(tmp_path / "out")[0]["recipe"]["training"]["hub_token"] == "***"
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert any(file.name == "training_args.bin" for file in files)  # into which Trainer pickles its arguments
    assert not any(b"hf_abc" in file.read_bytes() for file in files)
