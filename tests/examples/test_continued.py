"""Continued training: its starts are what they are called, runs begin at them, and like is compared with like."""

import json
import signal
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_dense
from finedeep import FinedeepForCausalLM
from finedeep.demo.world import World
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
import continued  # noqa: E402
import gpu_grid  # noqa: E402
import plain  # noqa: E402
import prepare  # noqa: E402
import starts  # noqa: E402
from packed import texts_to_train_and_measure_on  # noqa: E402
from recipe import read_recipe, runs_of  # noqa: E402
from starting_model import model_of  # noqa: E402


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("starts")
    make_dense(folder / "given")
    words = ["--calibration-tokens", "512", "--calibration-steps", "1", "--heal-steps", "1", "--heal-tokens", "512"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["x", str(folder / "given"), str(folder / "made"), *words])
        starts.main()
        before = {path: path.stat().st_mtime_ns for path in (folder / "made").rglob("*")}
        starts.main()  # there is nothing left to make
    assert {path: path.stat().st_mtime_ns for path in (folder / "made").rglob("*")} == before
    return folder / "made"


def test_what_is_called_exact_starts_as_the_dense_model(made):
    ids = torch.arange(1, 41).view(2, 20)
    with torch.no_grad():
        logits = {path.name: AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in made.iterdir()}
    grid = yaml.safe_load((ROOT / "examples/continue_grid.yaml").read_text())
    assert logits.keys() == {model["start"] for model in grid["models"].values()}
    for name in ("m1-k8", "grow-m2-k8", "wider"):
        torch.testing.assert_close(logits[name], logits["dense"], rtol=0, atol=1e-5)
    assert (logits["calibrated"] - logits["dense"]).abs().max() > 1e-3


def test_wider_has_the_size_of_the_grown_model_and_a_gradient_in_its_new_neurons(made):
    wider, grown = (
        LlamaForCausalLM.from_pretrained(made / "wider"),
        FinedeepForCausalLM.from_pretrained(made / "grow-m2-k8"),
    )
    new = grown.num_parameters() - wider.num_parameters()
    layers, d = grown.config.num_hidden_layers, grown.config.hidden_size
    assert new == layers * (d + 2 * 8 * d)  # the second norm, and the routers
    ids = torch.arange(1, 21).view(1, 20)
    wider(ids, labels=ids).loss.backward()
    down = wider.model.layers[0].mlp.down_proj.weight
    half = down.shape[1] // 2
    assert (down[:, half:] == 0).all()
    assert down.grad[:, half:].abs().max() > 0


@pytest.fixture
def recipe(tmp_path, made):
    texts = list(islice(World.from_seed(0).texts(0), 300))
    (tmp_path / "train.txt").write_text("\n".join(texts))
    recipe = read_recipe(ROOT / "examples/recipes/continue-260k.yaml")
    recipe["data"] |= {"train": str(tmp_path / "train.txt"), "document_characters": 200, "held_out_documents": 9}
    recipe["data"] |= {"validation_sequences": 3, "context": 32}
    recipe["training"] |= {"per_device_train_batch_size": 2, "max_steps": 4, "eval_steps": 2, "warmup_steps": 1}
    return recipe | {"start": str(made / "m1-k8"), "tokenizer": {"path": str(made / "dense")}}


def test_from_scratch_is_the_same_model_without_what_it_knew(recipe, made):
    tokenizer = AutoTokenizer.from_pretrained(made / "dense")
    one, same = (model_of(recipe | {"fresh": True}, tokenizer) for _ in range(2))
    known = model_of(recipe, tokenizer)
    assert one.config.to_diff_dict() == known.config.to_diff_dict()
    for a, b, c in zip(one.parameters(), same.parameters(), known.parameters(), strict=True):
        assert a.shape == c.shape
        assert torch.equal(a, b)
    assert not torch.equal(one.model.embed_tokens.weight, known.model.embed_tokens.weight)


def test_a_run_begins_at_its_start_and_says_what_it_was(tmp_path, recipe, made):
    prepare.prepare(recipe, tmp_path / "prepared")
    (tmp_path / "out").mkdir()
    handler = signal.getsignal(signal.SIGTERM)
    plain.train(recipe, tmp_path / "prepared", tmp_path / "out")
    assert signal.getsignal(signal.SIGTERM) == handler
    first, *points, last = map(json.loads, (tmp_path / "out/log.jsonl").read_text().splitlines())
    assert first["recipe"]["start"] == "m1-k8"  # no folder of this machine
    assert [point["step"] for point in points] == [0, 2, 4]
    _, measured = texts_to_train_and_measure_on(recipe["data"], tmp_path / "prepared")
    dense = LlamaForCausalLM.from_pretrained(made / "dense")
    windows = measured["held_out"].batch(range(3))
    with torch.no_grad():
        expected = dense(windows, labels=windows).loss.item()
    assert points[0]["eval_held_out_loss"] == pytest.approx(expected, abs=1e-4)
    assert points[-1]["eval_held_out_loss"] < expected
    assert points[0]["gate_mean"] == pytest.approx(1)
    assert points[0]["gate_std"] == pytest.approx(0, abs=1e-6)
    assert points[0]["nsar"].keys() == last["nsar"].keys()


def test_a_start_that_is_too_small_for_the_recipe_is_refused(recipe, made):
    tokenizer = AutoTokenizer.from_pretrained(made / "dense")
    recipe["data"]["context"] = 1000
    with pytest.raises(SystemExit, match="max_position_embeddings=128; the recipe's tokenizer and context need 1000"):
        model_of(recipe, tokenizer)


def test_seeds_are_orders_of_the_text():
    grid = yaml.safe_load((ROOT / "examples/continue_grid.yaml").read_text())
    runs = dict(runs_of(grid))
    assert {changes["data.seed"] for changes in runs.values()} == {0, 1, 2}
    assert not any("training.seed" in changes for changes in runs.values())


def test_the_grid_says_which_folder_it_needs(monkeypatch, tmp_path):
    words = [ROOT / "examples/continue_grid.yaml", tmp_path / "out.jsonl", "--train", tmp_path, "--author", tmp_path]
    monkeypatch.setattr(sys, "argv", ["x", *map(str, words)])
    with pytest.raises(SystemExit, match="name their folder, --starts"):
        gpu_grid.main()


def line(model, held_out, rate, seed, finished=True):
    losses = {
        name: held_out + more
        for name, more in (("eval_held_out_loss", 0), ("eval_author_loss", 1), ("eval_own_loss", 2))
    }
    points = [{"step": 0, "tokens": 0, "nsar": {"0.1": 0.5}} | dict.fromkeys(losses, 5.0)]
    points.append({"step": 10, "tokens": 1_000_000} | losses)
    recipe = {"training": {"learning_rate": rate}, "data": {"seed": seed}}
    found = {
        "name": f"260k/{model}/{rate}-{seed}",
        "finished": finished,
        "recipe": recipe,
        "parameters": 7,
        "log": points,
    }
    return found | {"nsar": {"0.1": 0.25}} | ({"gate_mean": 0.9, "gate_std": 0.3} if model != "dense" else {})


def test_differences_are_within_a_seed_each_at_its_best_rate(tmp_path):
    (tmp_path / "continued").mkdir()
    lines = [line("dense", 3.0, 0.1, 0), line("dense", 3.4, 0.1, 1), line("dense", 2.0, 0.2, 0, finished=False)]
    lines += [line("m-1-k-8", 2.9, 0.2, 0), line("m-1-k-8", 3.1, 0.2, 1), line("m-1-k-8", 2.95, 0.1, 0)]
    (tmp_path / "continued/a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tables = continued.tables_of_continued(continued.read_continued(tmp_path))
    dense, ours = ([cell.strip() for cell in row.strip("|").split("|")] for row in tables["continued"].splitlines()[2:])
    assert dense == [
        "260k, 1M tokens",
        "dense",
        "7",
        "0.1",
        "2",
        "5.000",
        "3.200",
        "",
        "4.200",
        "",
        "5.200",
        "",
        "0.500, 0.250",
        "",
    ]
    assert ours[1:8] == ["M=1 K=8", "7", "0.2", "2", "5.000", "3.000", "-0.200 (-0.300 to -0.100)"]
    assert ours[-2:] == ["0.500, 0.250", "0.90, 0.30"]
    assert tables["continued-curves"].splitlines()[-1].split("|")[3:5] == [" 5.000 ", " 5.000 "]
