"""Calibration: the streams are the models', the solutions are least squares', and nothing is lost on the way."""

import copy
import errno
import json

import numpy as np
import pytest
import torch
from conftest import make_dense
from finedeep.convert import ConversionError, convert_checkpoint
from finedeep.convert.assignment import PADDING
from finedeep.convert.calibrate import text as calibration_text
from finedeep.convert.calibrate.closed_form import correct
from finedeep.convert.calibrate.gradient import error_of, fit, logit_divergence, median_error, stream_error
from finedeep.convert.calibrate.least_squares import RIDGES, LeastSquares
from finedeep.convert.calibrate.neuron_statistics import activity_on, nonlinearity_on
from finedeep.convert.calibrate.residual_stream import Stream, longest_usual, over_chunks, through
from finedeep.convert.calibrate.run import LAYER, Calibration
from finedeep.convert.calibrate.text import sampled_batches, sampled_windows, text_windows
from finedeep.convert.plan import Options, make_plan
from finedeep.convert.receipt import RECEIPT, read_neuron_table
from finedeep.convert.source import open_checkpoint
from finedeep_cli import main
from finedeep_files.hashing import sha256
from finedeep_files.working_folder import WorkingFolder
from safetensors.torch import load_file
from test_convert import assert_same_logits, fingerprint, load
from test_families import CASES, make_family
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

CPU = torch.device("cpu")
QUICK = {"calibration_tokens": 4096, "calibration_steps": 12, "num_expert_sublayers": 2, "num_experts_per_sublayer": 4}


def calibrate(dense, out, text, **options):
    return convert_checkpoint(dense, out, **{"progress": False, "calibrate": str(text), **QUICK, **options})


def tokens(windows, length, vocabulary=256):
    return torch.randint(vocabulary, (windows, length), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    generator = np.random.default_rng(0)
    words = ["once", "upon", "a", "time", "there", "was", "text", "of", "no", "meaning", "at", "all."]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(generator.choice(words, 3000)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def gentle(tmp_path_factory):
    """A dense model with weights of a usual size, whose layers can be approximated."""
    folder = make_dense(tmp_path_factory.mktemp("gentle"), hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    model = LlamaForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.05 if "norm" in name else 0.2)
    model.save_pretrained(folder)
    return folder


# --- the streams -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_streams_are_those_of_the_models(tmp_path, case):
    """Of every family, against its own class: the stream after each layer, dense and cut."""
    dense = make_family(tmp_path / "dense", *CASES[case])
    plan = make_plan(open_checkpoint(tmp_path / "dense"), Options(num_expert_sublayers=2, num_experts_per_sublayer=4))
    convert_checkpoint(
        tmp_path / "dense", tmp_path / "cut", num_expert_sublayers=2, num_experts_per_sublayer=4, progress=False
    )
    ids = tokens(3, 24)
    seen = {"dense": streams(dense, ids), "finedeep": streams(load(tmp_path / "cut"), ids)}
    stream = Stream(plan, ids, CPU)
    for i, layer in enumerate(load(tmp_path / "cut").model.layers):
        ffn = stream.attend(i)
        over_chunks(lambda h, ffn=ffn: through([ffn], h, plan.config.residual_multiplier), stream.dense, CPU)
        over_chunks(lambda h, s=layer.sublayers: through(s, h, plan.config.residual_multiplier), stream.finedeep, CPU)
        for name, found in (("dense", stream.dense), ("finedeep", stream.finedeep)):
            torch.testing.assert_close(found, seen[name][i], rtol=1e-4, atol=1e-4 * seen[name][i].std().item())


def streams(model, ids):
    """The stream after each layer, from hooks."""
    found = []
    hooks = [
        layer.register_forward_hook(lambda module, inputs, out: found.append(out[0] if type(out) is tuple else out))
        for layer in model.model.layers
    ]
    model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


# --- the solutions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 1.0])
def test_least_squares(ridge):
    """Against NumPy's, on a system that has the ridge as further rows."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 6, generator=generator), torch.randn(50, 4, generator=generator)
    squares = LeastSquares()
    for part_x, part_y in zip(x.split(20), y.split(20), strict=True):
        squares.add(part_x, part_y)
    strength = ridge * np.diag(x.numpy().T.astype(float) @ x.numpy()).mean()
    rows = np.concatenate([x.numpy().astype(float), np.sqrt(strength) * np.eye(6)])
    expected = np.linalg.lstsq(rows, np.concatenate([y.numpy(), np.zeros((6, 4))]), rcond=None)[0]
    np.testing.assert_allclose(squares.solve(ridge).numpy().T, expected, rtol=1e-7, atol=1e-9)
    left = ((x.numpy() @ expected - y.numpy()) ** 2).sum(0)
    np.testing.assert_allclose(squares.residuals(ridge).numpy(), left, rtol=1e-5)


def test_inputs_that_are_always_zero_do_no_harm():
    squares = LeastSquares()
    x = torch.cat([torch.randn(40, 3), torch.zeros(40, 2)], dim=1)
    squares.add(x, torch.randn(40, 4))
    assert torch.equal(squares.solve(1e-3)[:, 3:], torch.zeros(4, 2, dtype=torch.float64))
    nothing = LeastSquares()
    nothing.add(torch.zeros(40, 3), torch.randn(40, 4))
    assert torch.equal(nothing.best_on(nothing), torch.zeros(4, 3, dtype=torch.float64))


def test_the_ridge_is_chosen_on_held_out_tokens():
    """Of noise nothing is to be learnt: the best on other tokens is next to nothing, or nothing."""
    fitted, held = LeastSquares(), LeastSquares()
    generator = torch.Generator().manual_seed(0)
    fitted.add(torch.randn(12, 10, generator=generator), torch.randn(12, 3, generator=generator))
    held.add(torch.randn(500, 10, generator=generator), torch.randn(500, 3, generator=generator))
    assert fitted.best_on(held).norm() < 0.5 * fitted.solve(RIDGES[0]).norm()


def layer_of(dense, **options):
    """The first layer's cut sub-layers, its dense FFN, and a stream before it."""
    plan = make_plan(
        open_checkpoint(dense), Options(**{"num_expert_sublayers": 2, "num_experts_per_sublayer": 4, **options})
    )
    stream = Stream(plan, tokens(32, 32), CPU)
    ffn = stream.attend(0)
    from finedeep.convert.calibrate.residual_stream import sublayers_from
    from finedeep.convert.cut import layer_tensors

    neurons = torch.arange(48).view(plan.options.num_expert_sublayers, 4, -1)
    return sublayers_from(plan.config, layer_tensors(plan, 0, neurons), 0, CPU), ffn, stream.dense.flatten(0, 1)


@torch.no_grad()
def test_the_closed_form_is_that_of_the_equations(gentle, monkeypatch):
    """Against the equations of `closed_form`, in NumPy in float64, with one ridge."""
    monkeypatch.setattr("finedeep.convert.calibrate.least_squares.RIDGES", (1e-3,))
    sublayers, ffn, dense_u = layer_of(gentle, num_expert_sublayers=3)
    dense_u[::100] *= 50  # tokens that plain squares would see before all others
    u = dense_u + 0.1 * torch.randn(dense_u.shape, generator=torch.Generator().manual_seed(5))
    r, held = 0.5, 128
    wanted = through([ffn], dense_u, r)
    weights = [
        {name: tensor.numpy().astype(float) for name, tensor in sublayer.state_dict().items()} for sublayer in sublayers
    ]
    correct(sublayers, u, dense_u, wanted, r, held)
    length = np.linalg.norm(wanted.numpy().astype(float), axis=1, keepdims=True)
    weight = 1 / np.maximum(length, 4 * np.sort(length, axis=0)[(len(length) - 1) // 2])

    def norm(h):
        return (
            h / np.sqrt((h**2).mean(-1, keepdims=True) + sublayers[0].norm.variance_epsilon) * weights[0]["norm.weight"]
        )

    def activation(w, n):
        gate = n @ w["gate_proj.weight"].T
        return gate / (1 + np.exp(-gate)) * (n @ w["up_proj.weight"].T)

    def ridge(x, y):
        x, y = weight * x, weight * y
        gram = x[held:].T @ x[held:]
        X = np.linalg.solve(gram + 1e-3 * np.diag(gram).mean() * np.eye(len(gram)), x[held:].T @ y[held:]).T
        return X if ((x[:held] @ X.T - y[:held]) ** 2).sum() < (y[:held] ** 2).sum() else 0 * X

    n_star, h, ideal = norm(dense_u.numpy().astype(float)), u.numpy().astype(float), dense_u.numpy().astype(float)
    for w, found in zip(weights, sublayers, strict=True):
        ideal = ideal + r * activation(w, n_star) @ w["down_proj.weight"].T
        A = np.eye(32) + ridge(norm(h), n_star - norm(h))
        w["gate_proj.weight"], w["up_proj.weight"] = w["gate_proj.weight"] @ A, w["up_proj.weight"] @ A
        a = activation(w, norm(h))
        w["down_proj.weight"] = w["down_proj.weight"] + ridge(a, (ideal - h) / r - a @ w["down_proj.weight"].T)
        h = h + r * a @ w["down_proj.weight"].T
        for name, tensor in found.state_dict().items():
            np.testing.assert_allclose(tensor.numpy(), w[name], rtol=1e-3, atol=1e-4, err_msg=name)


def test_a_layer_that_is_right_is_left_alone(gentle):
    """One sub-layer on the dense model's own stream has nothing to correct."""
    sublayers, _ffn, u = layer_of(gentle, num_expert_sublayers=1)
    before = copy.deepcopy(sublayers.state_dict())
    correct(sublayers, u, u, through([_ffn], u, 1.0), 1.0, 128)
    for name, tensor in sublayers.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-5)


@torch.no_grad()
def test_one_token_with_a_long_stream_does_not_decide(gentle):
    """As the first token of many models: calibration does for the others what it does without that one."""
    found = []
    for factor in (1, 1000):
        sublayers, ffn, dense_u = layer_of(gentle, num_expert_sublayers=2)
        noise = 0.1 * torch.randn(dense_u.shape, generator=torch.Generator().manual_seed(5))
        long = torch.ones(len(dense_u), 1)
        long[::64] = factor
        u, dense_u = long * (dense_u + noise), long * dense_u
        wanted = through([ffn], dense_u, 1.0)
        correct(sublayers, u, dense_u, wanted, 1.0, 128)
        objective = stream_error(longest_usual(wanted))
        steps = fit(
            sublayers, u, wanted, 1.0, objective, held=128, steps=20, generator=torch.Generator().manual_seed(0)
        )
        list(steps)
        found.append(median_error(sublayers, u, wanted, 1.0))
    assert found[1] < 1.1 * found[0]


@torch.no_grad()
def test_what_is_measured_of_neurons(gentle):
    """Against NumPy: mean |a|, and what is left of a after its weighted fit by n, times ||W_down[:, i]||^2."""
    _, ffn, u = layer_of(gentle)
    n = ffn.norm(u).double().numpy()
    a = (torch.nn.functional.silu(ffn.gate_proj(ffn.norm(u))) * ffn.up_proj(ffn.norm(u))).double().numpy()
    np.testing.assert_allclose(activity_on(ffn, u).numpy(), np.abs(a).mean(0), rtol=1e-4)
    weight = torch.rand(len(u), 1, generator=torch.Generator().manual_seed(3)) + 0.1
    w = weight.double().numpy()
    left = ((w * (a - n @ np.linalg.lstsq(w * n, w * a, rcond=None)[0])) ** 2).sum(0) * (
        ffn.down_proj.weight.double().numpy() ** 2
    ).sum(0)
    np.testing.assert_allclose(nonlinearity_on(ffn, u, weight).numpy(), left, rtol=1e-3)


@torch.no_grad()
def test_the_last_layers_objective_is_the_models_divergence(gentle):
    """KL of next-token probabilities, against SciPy on the logits of the whole model."""
    from scipy.special import rel_entr

    model = load(gentle).double()
    ids = tokens(2, 16)
    h = streams(model, ids)[-1].flatten(0, 1)
    other = h + 0.3 * torch.randn_like(h)
    objective = logit_divergence(
        model.model.norm.weight,
        model.lm_head.weight,
        make_plan(open_checkpoint(gentle), Options(num_expert_sublayers=2, num_experts_per_sublayer=4)).config,
    )
    p, q = (model.lm_head(model.model.norm(x)).softmax(-1).numpy() for x in (h, other))
    assert objective.error(other, h).item() == pytest.approx(rel_entr(p, q).sum(-1).mean(), rel=1e-5)


def test_the_fit_never_ends_worse_than_it_began(gentle):
    """On held-out tokens; and where no step helps, the weights are those that it was given."""
    sublayers, ffn, u = layer_of(gentle)
    wanted = through([ffn], u, 1.0)
    objective = stream_error(10.0)
    before = error_of(sublayers, u[:256], wanted[:256], 1.0, objective)
    lowest = list(
        fit(
            sublayers,
            u,
            wanted,
            1.0,
            stream_error(10.0),
            held=256,
            steps=60,
            generator=torch.Generator().manual_seed(0),
        )
    )
    assert lowest == sorted(lowest, reverse=True)
    assert error_of(sublayers, u[:256], wanted[:256], 1.0, stream_error(10.0)) == pytest.approx(lowest[-1])
    assert lowest[-1] < 0.5 * before
    right = torch.nn.ModuleList([ffn])
    given = copy.deepcopy(right.state_dict())
    list(fit(right, u, wanted, 1.0, stream_error(10.0), held=256, steps=20, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(tensor, given[name]) for name, tensor in right.state_dict().items())


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 9, 10, 19, 20])
def test_any_number_of_steps(gentle, steps):
    sublayers, ffn, u = layer_of(gentle)
    how = {"held": 256, "steps": steps, "generator": torch.Generator().manual_seed(0)}
    assert len(list(fit(sublayers, u, through([ffn], u, 1.0), 1.0, stream_error(10.0), **how))) == steps


# --- the conversion --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_calibration_brings_the_model_nearer(tmp_path, gentle, text):
    """Measured on the whole model's logits, on a text that it was not calibrated on."""
    done = calibrate(gentle, tmp_path / "calibrated", text, calibration_tokens=8192, calibration_steps=60)
    convert_checkpoint(gentle, tmp_path / "cut", num_expert_sublayers=2, num_experts_per_sublayer=4, progress=False)
    ids = AutoTokenizer.from_pretrained(gentle)("there was no text at all. once of meaning a time", return_tensors="pt")
    wanted = LlamaForCausalLM.from_pretrained(gentle)(**ids).logits.log_softmax(-1)
    off = {}
    for name in ("cut", "calibrated"):
        logits = load(tmp_path / name)(**ids).logits.log_softmax(-1)
        off[name] = torch.nn.functional.kl_div(logits, wanted, log_target=True, reduction="batchmean").item()
    assert off["calibrated"] < 0.5 * off["cut"]
    for layer in done.calibration:
        assert layer.closed_form < layer.cut
    receipt = json.loads((tmp_path / "calibrated" / RECEIPT).read_text())
    assert receipt["calibration"]["tokens"] == 8192
    assert receipt["calibration"]["text"]["name"] == "text.txt"
    assert len(receipt["calibration"]["relative_errors"]) == 2
    assert not [path.name for path in (tmp_path / "calibrated").iterdir() if path.name.startswith(".")]


@torch.no_grad()
def test_the_errors_are_those_of_the_models(tmp_path, gentle, text):
    """The median over tokens of |h - h*| / |h*| of the last layer, from the finished folder and the dense model."""
    done = calibrate(gentle, tmp_path / "out", text)
    plan = make_plan(open_checkpoint(gentle), Options(calibrate=str(text), **QUICK))
    calibration = Calibration(plan, tmp_path, progress=False)
    ids = calibration._windows()[: round(4096 / 128 / 16)]
    dense = LlamaForCausalLM.from_pretrained(gentle).eval()
    wanted, found = streams(dense, ids)[-1], streams(load(tmp_path / "out"), ids)[-1]
    errors = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert done.calibration[-1].calibrated == pytest.approx(errors.median().item(), rel=1e-3)


def test_the_same_options_give_the_same_bytes(tmp_path, dense, text):
    calibrate(dense, tmp_path / "one", text)
    receipt = json.loads((tmp_path / "one" / RECEIPT).read_text())
    convert_checkpoint(dense, tmp_path / "two", progress=False, **{**receipt["options"], "calibrate": str(text)})
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "two")
    calibrate(dense, tmp_path / "three", text, seed=1)
    assert fingerprint(tmp_path / "one") != fingerprint(tmp_path / "three")


@pytest.mark.parametrize("exact", [{"num_expert_sublayers": 1}, {"mode": "grow"}])
def test_what_is_exact_stays_exact(tmp_path, dense, text, exact):
    done = calibrate(dense, tmp_path / "out", text, **exact)
    assert done.exact
    assert done.calibration == []
    assert_same_logits(dense, tmp_path / "out")


def test_a_stopped_calibration_goes_on_with_the_next_layer(tmp_path, dense, text, monkeypatch):
    out, climbed = tmp_path / "out", []
    climb = Calibration._best_stage

    def stopping(self, cut, u, dense_u, wanted, i, *more):
        climbed.append(i)
        if climbed == [0, 1]:
            raise KeyboardInterrupt
        return climb(self, cut, u, dense_u, wanted, i, *more)

    monkeypatch.setattr(Calibration, "_best_stage", stopping)
    with pytest.raises(KeyboardInterrupt, match="--resume continues"):
        calibrate(dense, out, text)
    assert not out.exists()
    assert (WorkingFolder(out).path / LAYER.format(0)).exists()
    calibrate(dense, out, text, resume=True)
    assert climbed == [0, 1, 1]
    calibrate(dense, tmp_path / "at once", text)
    assert fingerprint(out) == fingerprint(tmp_path / "at once")


def ending_in_layer_1(error):
    """In the place of `Calibration._best_stage`: layer 0 is done, and then this is raised."""
    climb = Calibration._best_stage

    def ending(self, cut, u, dense_u, wanted, i, *more):
        if i == 1:
            raise error
        return climb(self, cut, u, dense_u, wanted, i, *more)

    return ending


def test_a_changed_text_is_not_gone_on_with(tmp_path, dense, text, monkeypatch):
    mine = tmp_path / "text.txt"
    mine.write_bytes(text.read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(Calibration, "_best_stage", ending_in_layer_1(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            calibrate(dense, tmp_path / "out", mine)
    mine.write_bytes(text.read_bytes()[::-1])
    with pytest.raises(ConversionError, match="calibration text differ"):
        calibrate(dense, tmp_path / "out", mine, resume=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept(tmp_path, text, dtype):
    make_dense(tmp_path / "dense", dtype=dtype)
    calibrate(tmp_path / "dense", tmp_path / "out", text)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out/model.safetensors").values()} == {dtype}


def test_dead_neurons_and_padding_do_no_harm(tmp_path, text):
    """44 neurons for 2 x 4 experts are filled up to 48; a third of them never speak."""
    folder = make_dense(tmp_path / "dense")
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight[:16] = 0
            layer.mlp.down_proj.weight[:, 8:24] = 0
    model.save_pretrained(folder)
    done = calibrate(folder, tmp_path / "out", text)
    assert all(np.isfinite([layer.closed_form, layer.calibrated]).all() for layer in done.calibration)
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    for i, neurons in enumerate(read_neuron_table(tmp_path / "out", 2, 44)):
        assert (neurons == PADDING).sum() == 4
        for m, padding in enumerate(neurons.flatten(1) == PADDING):
            sublayer = f"model.layers.{i}.sublayers.{m}."
            assert not tensors[f"{sublayer}down_proj.weight"][:, padding].any()
            assert tensors[f"{sublayer}up_proj.weight"][padding].any(1).all()  # DoRA divides by the norms of rows


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("granite, biases", {}),
        ("granite", {"num_expert_sublayers": 3}),
        ("qwen3", {"routing_input": "hidden_state"}),
        ("phi3", {"routing_function": "softmax"}),
    ],
)
def test_every_kind_of_layer_is_calibrated(tmp_path, text, case, options):
    make_family(tmp_path / "dense", *CASES[case])
    done = calibrate(tmp_path / "dense", tmp_path / "out", text, **{"calibration_steps": 30, **options})
    assert all(layer.calibrated < layer.cut for layer in done.calibration[:-1])
    load(tmp_path / "out")


def test_an_ffn_that_does_nothing_is_left_alone(tmp_path, text):
    folder = make_dense(tmp_path / "dense")
    model = LlamaForCausalLM.from_pretrained(folder)
    torch.nn.init.zeros_(model.model.layers[0].mlp.down_proj.weight)
    model.save_pretrained(folder)
    done = calibrate(folder, tmp_path / "out", text)
    assert done.calibration[0].calibrated == 0 < done.calibration[1].calibrated


def test_a_text_that_changes_meanwhile_is_not_what_the_receipt_names(tmp_path, dense, text, monkeypatch):
    mine = tmp_path / "text.txt"
    mine.write_bytes(text.read_bytes())
    climb = Calibration._best_stage

    def removing(self, *arguments):
        mine.unlink(missing_ok=True)
        return climb(self, *arguments)

    monkeypatch.setattr(Calibration, "_best_stage", removing)
    calibrate(dense, tmp_path / "out", mine)
    receipt = json.loads((tmp_path / "out" / RECEIPT).read_text())
    assert receipt["calibration"]["text"] == {"name": "text.txt", "sha256": sha256(text)}


@pytest.mark.parametrize(
    "error", [RuntimeError("out of memory"), ConversionError("not finite"), OSError(errno.ENOSPC, "disk full")]
)
def test_no_error_costs_what_is_done(tmp_path, dense, text, monkeypatch, error):
    """Nor does the same command, typed again without a thought."""
    with monkeypatch.context() as patch:
        patch.setattr(Calibration, "_best_stage", ending_in_layer_1(error))
        with pytest.raises((RuntimeError, ConversionError), match="--resume continues from it, --overwrite starts"):
            calibrate(dense, tmp_path / "out", text)
    assert (WorkingFolder(tmp_path / "out").path / LAYER.format(0)).exists()
    with pytest.raises(ConversionError, match=r"--resume continues from it, --overwrite starts again"):
        calibrate(dense, tmp_path / "out", text)
    calibrate(dense, tmp_path / "out", text, resume=True)


# --- the text --------------------------------------------------------------------------------------------------------


def test_sampled_windows(dense):
    model = LlamaForCausalLM.from_pretrained(dense)
    windows = sampled_windows(model, 1024, seed=3, progress=False)
    assert windows.shape == (8, 128)
    assert windows.max() < 260
    assert windows[:, 0].eq(model.config.bos_token_id).all()
    assert torch.equal(windows, sampled_windows(model, 1024, seed=3, progress=False))
    assert not torch.equal(windows, sampled_windows(model, 1024, seed=4, progress=False))
    model.config.bos_token_id = model.generation_config.bos_token_id = None
    assert len(sampled_windows(model, 1024, seed=3, progress=False)[:, 0].unique()) > 4


def test_processes_take_turns_at_sampling(dense, monkeypatch):
    """What two of them sample is what one samples, batch by batch."""
    monkeypatch.setattr(calibration_text, "AT_A_TIME", 3)
    model = LlamaForCausalLM.from_pretrained(dense)
    alone = sampled_batches(model, 1024, seed=3, progress=False)
    first, second = (sampled_batches(model, 1024, 3, False, process=process, processes=2) for process in range(2))
    assert [len(batch) for batch in alone] == [3, 3, 2]
    assert all(map(torch.equal, alone, [first[0], second[0], first[1]]))
    assert not torch.equal(alone[0], alone[1])


@torch.no_grad()
def test_sampled_windows_follow_the_models_probabilities(dense):
    """Of the second token, by a chi-squared test against the model's own probabilities."""
    from scipy.stats import chisquare

    model = LlamaForCausalLM.from_pretrained(dense).eval()
    found = torch.cat([sampled_windows(model, 8 * 1024, seed, progress=False, length=2)[:, 1] for seed in range(2)])
    model.generation_config.repetition_penalty = 5.0  # of a checkpoint's generation_config.json, not of the model
    p = model(torch.tensor([[model.config.bos_token_id]])).logits[0, -1].double().softmax(-1)
    expected, observed = (p * len(found)).numpy(), torch.bincount(found, minlength=260).numpy()
    often = expected >= 5
    if not often.all():
        expected, observed = (np.append(x[often], x[~often].sum()) for x in (expected, observed))
    assert chisquare(observed, expected).pvalue > 1e-4


def test_a_long_text_is_read_from_all_over(tmp_path, dense):
    path = tmp_path / "long.txt"
    path.write_text("".join(chr(ord("a") + i * 26 // 200_000) for i in range(200_000)))
    config = make_plan(open_checkpoint(dense), Options(num_expert_sublayers=2, num_experts_per_sublayer=4)).config
    windows = text_windows(dense, path, config, 4096)
    assert windows.numel() <= 4096
    assert len(windows.unique()) >= 24


def test_self_needs_no_text(tmp_path, dense, capsys):
    arguments = ["convert", str(dense), str(tmp_path / "out"), "--sublayers", "2", "--calibrate", "self"]
    assert main([*arguments, "--calibration-tokens", "4096", "--calibration-steps", "3"]) == 0
    said = capsys.readouterr()
    assert "layer 1: error relative to the stream, median token: cut" in said.err
    assert "errors relative to the stream, on held-out text" in said.out
    assert json.loads((tmp_path / "out" / RECEIPT).read_text())["calibration"]["text"] == "self"
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read as UTF-8 text"),
        (b"", "is empty"),
        (b" \n ", "is empty"),
        (b"\xff\xfe\x00", "cannot be read as UTF-8 text"),
        (b"Too short.", "has 10 tokens; it needs at least 256"),
        (b"Short. " * 40, "leave 128 to learn from; with hidden size 64, at least 256 are needed"),
    ],
)
def test_texts_that_will_not_do(tmp_path, content, words):
    make_dense(tmp_path / "dense", hidden_size=64)
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConversionError, match=words):
        calibrate(tmp_path / "dense", tmp_path / "out", path)
    assert not (tmp_path / "out").exists()
    assert not WorkingFolder(tmp_path / "out").path.exists()


def test_a_tokenizer_that_is_not_the_models(tmp_path, text):
    make_dense(tmp_path / "dense", vocab_size=100, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    with pytest.raises(ConversionError, match=r"the model has 100 tokens\. They do not belong together"):
        calibrate(tmp_path / "dense", tmp_path / "out", text)
    for file in (tmp_path / "dense").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ConversionError, match="has no tokenizer that can be loaded"):
        calibrate(tmp_path / "dense", tmp_path / "out", text)


def test_activations_that_overflow_are_told_of(tmp_path, text):
    folder = make_dense(tmp_path / "dense")
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(1e38)
    model.save_pretrained(folder)
    with pytest.raises(ConversionError, match="layer 0 the dense model's activations are NaN or infinite"):
        calibrate(folder, tmp_path / "out", text)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"calibration_steps": -1}, "calibration_steps=-1 is not a whole number"),
        ({"calibration_tokens": 0}, "calibration_tokens=0 is not a whole number"),
        ({"calibration_tokens": "many"}, "calibration_tokens='many' is not a whole number"),
        ({"calibrate": None, "assignment": "nonlinearity"}, "is measured in calibration"),
    ],
)
def test_options_that_cannot_be_met(tmp_path, dense, text, options, words):
    with pytest.raises(ConversionError, match=words):
        calibrate(dense, tmp_path / "out", **{"text": text, **options}) if "calibrate" not in options else (
            convert_checkpoint(dense, tmp_path / "out", progress=False, **options)
        )
