"""Sparsity and gates, against NumPy on activations that are hooked here."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, random_model
from finedeep.eval import EvaluationError
from finedeep.eval.inspect import inspection, recorder
from finedeep.eval.inspect.inspection import inspect
from finedeep_cli import main
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

WINDOW = 32


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    draw = np.random.default_rng(0)
    words = ["".join(draw.choice(list("abcdefgh ."), 7)) for _ in range(80)]
    path.write_text("\n".join(words))
    return path


@pytest.fixture(scope="module")
def finedeep(tmp_path_factory):
    """M = 2, K = 4, random routers."""
    folder = tmp_path_factory.mktemp("finedeep")
    random_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def short_windows(monkeypatch):
    monkeypatch.setattr(inspection, "WINDOW", WINDOW)


def windows_of(folder, text, number):
    """What `inspect` is to send through: the text's tokens in windows. This tokenizer puts nothing before a text."""
    ids = AutoTokenizer.from_pretrained(folder)(text.read_text())["input_ids"]
    return torch.tensor(ids[: number * WINDOW]).view(number, WINDOW)


def hooked(folder, text, number=6):
    """Outputs of all act_fn (NumPy arrays (tokens, width)), of all FFNs, and the model's loss."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    acts, outputs = [], []
    for name, module in model.named_modules():
        if name.endswith(".act_fn"):
            module.register_forward_hook(lambda m, i, o: acts.append(o.flatten(0, -2).numpy()))
        if re.fullmatch(r".*(\.mlp|\.sublayers\.\d+)", name):
            module.register_forward_hook(lambda m, i, o: outputs.append(o))
    ids = windows_of(folder, text, number)
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    return model, acts, outputs, loss


@pytest.mark.parametrize("kind", ["dense", "finedeep"])
def test_nsar_and_histogram_are_numpys(kind, text, request):
    folder = request.getfixturevalue(kind)
    _, acts, _, loss = hooked(folder, text)
    found = inspect(folder, text, tokens=6 * WINDOW, progress=False)
    for t in recorder.THRESHOLDS:
        assert found["nsar"][str(t)] == pytest.approx(np.mean([np.abs(a) > t for a in acts]), rel=1e-6)
    per_layer = len(acts) // 2
    for layer in (0, 1):
        mine = acts[layer * per_layer : (layer + 1) * per_layer]
        assert found["layers"][layer]["nsar"]["0.1"] == pytest.approx(np.mean([np.abs(a) > 0.1 for a in mine]))
    for place, a in zip(found["places"], acts, strict=True):
        assert place["nsar"]["0.1"] == pytest.approx(np.mean(np.abs(a) > 0.1))
        counts, _ = np.histogram(np.clip(a, found["edges"][0], found["edges"][-1]), bins=np.array(found["edges"]))
        assert np.abs(np.array(place["histogram"]) - counts).sum() <= 4  # a value at an edge may fall to either side
        assert sum(place["histogram"]) == a.size
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["predicted_tokens"] == 6 * (WINDOW - 1)


def test_gates_are_those_of_the_model(finedeep, text):
    _, _, outputs, _ = hooked(finedeep, text)
    found = inspect(finedeep, text, tokens=6 * WINDOW, progress=False)
    for place, (y, g) in zip(found["places"], outputs, strict=True):
        y, g = y.flatten(0, 1).double().numpy(), g.flatten(0, 1).double().numpy()
        gates = place["gates"]
        np.testing.assert_allclose(gates["mean"], g.mean(0), rtol=1e-6)
        np.testing.assert_allclose(gates["std"], g.std(0), rtol=1e-5)
        np.testing.assert_allclose(gates["near_0"], (g / 2 < 0.05).mean(0), rtol=1e-6)
        np.testing.assert_allclose(gates["near_1"], (g / 2 > 0.95).mean(0), rtol=1e-6)
        np.testing.assert_allclose(gates["correlation"], np.corrcoef(g.T), atol=1e-6)
        off = np.corrcoef(g.T)[~np.eye(4, dtype=bool)]
        assert gates["mean_absolute_correlation"] == pytest.approx(np.abs(off).mean(), rel=1e-6)
        p = g / g.sum(1, keepdims=True)
        assert gates["entropy"] == pytest.approx(-(p * np.log(p)).sum(1).mean() / np.log(4), rel=1e-6)
        singular = np.linalg.svd(y, compute_uv=False)
        q = singular / singular.sum()
        assert place["effective_rank"] == pytest.approx(np.exp(-(q * np.log(q)).sum()), rel=1e-5)


def test_shares_of_experts_in_plain_loops(finedeep, text):
    model = AutoModelForCausalLM.from_pretrained(finedeep)
    seen = []
    sublayer = model.model.layers[1].sublayers[1]
    sublayer.register_forward_hook(lambda m, i, o: seen.append((i[0], o[1])))
    with torch.no_grad():
        model(windows_of(finedeep, text, 1))
        h, g = (x.flatten(0, 1) for x in seen[0])
        n = sublayer.norm(h)
        norms = torch.zeros(len(h), 4)
        for k in range(4):
            mine = slice(k * 6, (k + 1) * 6)
            gate, up = sublayer.gate_proj.weight[mine] @ n.T, sublayer.up_proj.weight[mine] @ n.T
            E = sublayer.down_proj.weight[:, mine] @ (torch.nn.functional.silu(gate) * up)
            norms[:, k] = g[:, k] * E.norm(dim=0)
    shares = (norms / norms.sum(1, keepdim=True)).numpy()
    found = inspect(finedeep, text, tokens=WINDOW, progress=False)["places"][3]["gates"]
    np.testing.assert_allclose(found["mean_share"], shares.mean(0), rtol=1e-4)
    np.testing.assert_allclose(found["largest_share"], shares.max(0), rtol=1e-4)


def test_an_expert_that_puts_nothing_out_never_matters(tmp_path, text):
    model = random_model()
    with torch.no_grad():
        model.model.layers[0].sublayers[1].down_proj.weight[:, 6:12] = 0
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    found = inspect(tmp_path, text, tokens=WINDOW, progress=False)
    assert [place["gates"]["never_matters"] for place in found["places"]] == [0, 1, 0, 0]
    assert found["places"][1]["gates"]["largest_share"][1] == 0


def test_conversions_padding_is_not_counted(dense, converted, text):
    """44 neurons in 8 experts of 6: four are zeros that were not in the dense model."""
    before, after = (inspect(folder, text, tokens=4 * WINDOW, progress=False) for folder in (dense, converted))
    assert before["places"][0]["values"] == after["places"][0]["values"] == 4 * WINDOW * 44
    for t, share in before["nsar"].items():
        assert after["nsar"][t] == pytest.approx(share, abs=2e-4)
    assert after["places"][0]["gates"]["std"] == [0] * 8
    assert after["places"][0]["gates"]["mean_absolute_correlation"] is None


def test_batches_and_pieces_do_not_matter(finedeep, text, monkeypatch):
    whole = inspect(finedeep, text, progress=False)
    monkeypatch.setattr(inspection, "BATCH", 1)
    monkeypatch.setattr(inspection, "PIECE", 64)
    small = inspect(finedeep, text, progress=False)
    assert small["predicted_tokens"] == whole["predicted_tokens"] == 639 // WINDOW * (WINDOW - 1)
    assert small["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    for a, b in zip(small["places"], whole["places"], strict=True):
        assert a["nsar"]["0.1"] == pytest.approx(b["nsar"]["0.1"], abs=1e-3)
        np.testing.assert_allclose(a["gates"]["mean"], b["gates"]["mean"], rtol=1e-5)


def test_wide_outputs_of_low_rank_are_projected(monkeypatch):
    """Four directions in the last of 512 dimensions, which leaving dimensions out would lose."""
    monkeypatch.setattr(recorder, "WIDEST", 256)
    recorder.projection.cache_clear()
    generator = torch.Generator().manual_seed(0)
    y = torch.zeros(1000, 512)
    y[:, 500:504] = torch.randn(1000, 4, generator=generator)
    place = recorder.Place(0, 0)
    place.add_output(y)
    assert place.sums["moments"].shape == (256, 256)
    assert recorder.effective_rank(place.sums["moments"]) == pytest.approx(4, rel=0.02)
    recorder.projection.cache_clear()


def test_the_command_writes_json_and_figures(tmp_path, capsys, finedeep, dense, text):
    words = ["inspect", finedeep, "--text", text, "--baseline", dense, "--output", tmp_path / "out", "--quiet"]
    assert main(list(map(str, words))) == 0
    printed = capsys.readouterr().out
    assert re.search(r"\| NSAR at 0.1 +\| +[\d.]+% +\| +[\d.]+% \|", printed)
    found = json.loads((tmp_path / "out" / "inspection.json").read_text())
    assert list(found) == ["dense", "finedeep"]
    assert len(found["finedeep"]["tokens"]) == len(found["finedeep"]["token_gates"]) == WINDOW
    names = {path.name for path in (tmp_path / "out").iterdir()}
    figures = ("activations", "nsar", "gates", "token_gates")
    assert names == {
        "inspection.json",
        "finedeep_results.json",
        *(f"{f}.{kind}" for f in figures for kind in ("svg", "png")),
    }
    assert all((tmp_path / "out" / name).stat().st_size > 3000 for name in names - {"finedeep_results.json"})
    assert main(list(map(str, words))) == 2
    assert "--overwrite replaces it" in capsys.readouterr().err
    (tmp_path / "out/mine.txt").touch()
    assert main([*map(str, words), "--overwrite"]) == 2
    assert "mine.txt is on no finished run's list" in capsys.readouterr().err
    (tmp_path / "out/mine.txt").unlink()
    assert main([*map(str, words), "--overwrite"]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


def test_without_matplotlib_the_message_says_how_to_get_it(tmp_path, capsys, monkeypatch, dense, text):
    without(monkeypatch, "matplotlib")
    monkeypatch.setattr(inspection, "load", None)
    assert main(["inspect", str(dense), "--text", str(text), "--output", str(tmp_path / "out"), "--quiet"]) == 2
    assert re.search(r"matplotlib.* pip install 'finedeep\[plots\]'", capsys.readouterr().err)


def without(monkeypatch, *packages):
    """As if packages were not installed, for the modules that draw or compare, which have not been imported yet."""
    for module in ("inspect.plots", "compare.comparison", "compare.paired_statistics"):
        monkeypatch.delitem(sys.modules, f"finedeep.eval.{module}", raising=False)
        monkeypatch.delattr(f"finedeep.eval.{module}", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        monkeypatch.delitem(sys.modules, name)
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)


def test_figures_want_no_more_than_the_extra_of_plots(tmp_path, monkeypatch, finedeep, text):
    """Which is matplotlib; what comparisons want is not in it."""
    without(monkeypatch, "scipy", "lm_eval", "jinja2")
    assert main(["inspect", str(finedeep), "--text", str(text), "--output", str(tmp_path), "--quiet"]) == 0
    assert (tmp_path / "gates.svg").exists()


def test_what_goes_wrong_with_figures_does_not_lose_the_inspection(tmp_path, monkeypatch, finedeep, text):
    found = {"model": inspect(finedeep, text, progress=False)}
    without(monkeypatch, "matplotlib")
    with pytest.raises(EvaluationError, match="matplotlib"):
        inspection.save(found, tmp_path)
    assert json.loads((tmp_path / "inspection.json").read_text()) == found


def test_a_dense_model_alone(capsys, dense, text):
    assert main(["inspect", str(dense), "--text", str(text), "--quiet"]) == 0
    assert "gates" not in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", " \n\n", None])
def test_an_empty_or_missing_text_is_named(tmp_path, capsys, dense, content):
    path = tmp_path / "nothing.txt"
    if content is not None:
        path.write_text(content)
    assert main(["inspect", str(dense), "--text", str(path)]) == 2
    assert re.fullmatch(r"finedeep: error: .*nothing.txt .*\n", capsys.readouterr().err)


def test_a_text_shorter_than_a_window_will_do(tmp_path, dense):
    (tmp_path / "short.txt").write_text("abcd")
    assert inspect(dense, tmp_path / "short.txt", progress=False)["predicted_tokens"] == 3


def test_a_model_without_gated_ffns_is_refused(tmp_path, text):
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=260)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(EvaluationError, match="not every layer of GPT2LMHeadModel has a gated FFN"):
        inspect(tmp_path, text, progress=False)


def test_a_model_with_experts_in_some_layers_is_refused(tmp_path, text):
    """Its dense layers alone would pass for the whole."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_attention_heads": 4}
    sizes |= {"num_hidden_layers": 2, "num_key_value_heads": 4, "vocab_size": 260, "num_experts": 4}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(mlp_only_layers=[0], **sizes)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(EvaluationError, match="not every layer of Qwen3MoeForCausalLM"):
        inspect(tmp_path, text, progress=False)


def test_what_is_held_does_not_grow_with_the_text(finedeep, text, monkeypatch):
    """Sums of the same size after one window and after six; and no more of the text is read than was asked for."""
    held = []

    def summary_of(places):
        held.append({name: s.shape for place in places for name, s in place.sums.items()})
        return {"places": []}

    read = []
    usual = inspection.pieces

    def pieces(*arguments):
        for ids in usual(*arguments):
            read.append(len(ids))
            yield ids

    monkeypatch.setattr(inspection, "summary_of", summary_of)
    monkeypatch.setattr(inspection, "pieces", pieces)
    monkeypatch.setattr(inspection, "PIECE", 16)
    monkeypatch.setattr(inspection, "BATCH", 1)
    for windows in (1, 6):
        read.clear()
        inspect(finedeep, text, tokens=windows * WINDOW, progress=False)
        assert windows * WINDOW <= sum(read) < windows * WINDOW + 32
    assert held[0] == held[1]


def test_so_many_tokens_and_no_more(finedeep, text):
    assert inspect(finedeep, text, tokens=10, progress=False)["predicted_tokens"] == 9


def test_bytes_far_into_a_file_that_are_no_text(tmp_path, capsys, finedeep):
    (tmp_path / "late.txt").write_bytes(b"words and words\n" * 20_000 + b"\xff")
    assert main(["inspect", str(finedeep), "--text", str(tmp_path / "late.txt"), "--quiet"]) == 2
    assert "late.txt cannot be read" in capsys.readouterr().err


def test_an_output_that_cannot_be_made_is_named_first(tmp_path, capsys, monkeypatch, finedeep, text):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(inspection, "load", None)
    assert main(["inspect", str(finedeep), "--text", str(text), "--output", str(tmp_path / "file")]) == 2
    assert "exists and is not a folder; name a folder" in capsys.readouterr().err


@pytest.mark.parametrize("function", ["sigmoid", "softmax"])
def test_gates_as_they_are_made_are_neither_near_0_nor_near_c(tmp_path, text, function):
    model = random_model(routing_function=function, num_experts_per_sublayer=24)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("router"):
                parameter.zero_()
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    gates = inspect(tmp_path, text, tokens=WINDOW, progress=False)["places"][0]["gates"]
    assert gates["mean"] == pytest.approx([1] * 24)
    assert sum(gates["near_0"]) == sum(gates["near_1"]) == 0


@pytest.mark.parametrize("options", [["--device", "gpu"], ["--dtype", "fp16"]])
def test_a_device_or_dtype_that_is_none(capsys, finedeep, text, options):
    with pytest.raises(SystemExit):
        main(["inspect", str(finedeep), "--text", str(text), *options])
    assert options[1] in capsys.readouterr().err


def test_a_model_of_nan_is_refused(tmp_path, text):
    model = random_model()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(EvaluationError, match="loss of nan"):
        inspect(tmp_path, text, progress=False)


def places(mean, c=2.0):
    return [{"layer": 0, "sublayer": m, "nsar": {"0.1": 0.5}, "gates": {"mean": mean, "c": c}} for m in range(2)]


def test_gates_are_drawn_around_one_and_not_where_they_are_constant():
    """With colours as far to both sides as the gates go, whatever c is."""
    from finedeep.eval.inspect import plots

    found = {"layers": [{"layer": 0}], "places": places([1.0, 1.0])}
    assert plots.gates(found) is None
    found["places"] = places([0.9, 1.02])
    (image,) = plots.gates(found).axes[0].get_images()
    assert image.get_clim() == pytest.approx((0.9, 1.1))
    tokens = np.ones((3, 1, 2, 2))
    assert plots.token_gates({**found, "token_gates": tokens, "tokens": list("abc")}) is None
    tokens[1, 0, 1, 1] = 1.5
    (image,) = plots.token_gates({**found, "token_gates": tokens, "tokens": list("abc")}).axes[0].get_images()
    assert image.get_clim() == pytest.approx((0.5, 1.5))


def test_differences_have_perplexities_beside_shares():
    from types import SimpleNamespace as Some

    from finedeep.eval.inspect import plots

    def row(task, metric, mean, difference, baseline):
        interval = Some(difference=difference, low=difference - 0.1, high=difference + 0.1)
        place, score = Some(task=task, metric=metric), Some(value=baseline)
        return Some(main=True, is_mean=mean, difference=interval, place=place, baseline=score)

    shares = row("a", "acc", True, 0.02, 0.5)
    figure = plots.differences([shares, row("w", "word_perplexity", False, 0.5, 20.0)])
    assert [len(axes.get_yticks()) for axes in figure.axes] == [1, 1]
    assert [axes.get_xlabel().split(",")[0] for axes in figure.axes] == [
        "Finedeep - dense",
        "(Finedeep - dense) in % of dense",
    ]
    dots = [line.get_xdata() for line in figure.axes[1].lines if line.get_marker() == "o"]
    assert dots == [[pytest.approx(2.5)]]
    assert len(plots.differences([shares]).axes) == 1
