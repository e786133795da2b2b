"""What torch, torchao and transformers put around a model: M=1 answers as the dense model does, and M=2 answers.

Programs that have to be installed first are in tests/programs.
"""

import copy
import math

import pytest
import torch
from conftest import TINY
from finedeep import FinedeepForCausalLM
from finedeep.convert import convert_checkpoint
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import LlamaConfig, LlamaForCausalLM, TorchAoConfig, WatermarkDetector, WatermarkingConfig

SIZES = TINY | {"intermediate_size": 64}  # both multiples of 32: torchao has groups
IDS = torch.arange(64).remainder(250)[None].repeat(2, 1)
CUTS = {"M=1": (1, 4), "M=2": (2, 2)}

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("programs")
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(**SIZES))
    for name, parameter in dense.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.2)
    dense.save_pretrained(root / "dense")
    for name, (M, K) in CUTS.items():
        shape = {"num_expert_sublayers": M, "num_experts_per_sublayer": K}
        convert_checkpoint(root / "dense", root / name, **shape, progress=False)
    return {name: root / name for name in ("dense", *CUTS)}


def load(folder, **options):
    return (
        (LlamaForCausalLM if folder.name == "dense" else FinedeepForCausalLM).from_pretrained(folder, **options).eval()
    )


def loss_of(model):
    return model(input_ids=IDS, labels=IDS).loss.item()


def same(losses, tolerance=1e-5):
    assert losses["M=1"] == pytest.approx(losses["dense"], rel=tolerance), losses
    assert math.isfinite(losses["M=2"]), losses


def linears(model):
    return [module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]


def weights_in(config_name):
    def made(folder):
        quantization = pytest.importorskip("torchao.quantization")
        return load(folder, quantization_config=TorchAoConfig(getattr(quantization, config_name)()))

    return made


def qat(folder):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup, quantize_
    from torchao.quantization.qat import QATConfig

    model = load(folder)
    base = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))
    quantize_(model, QATConfig(base, step="prepare"))
    return model


def pruned(folder):
    model = load(folder)
    for module in linears(model):
        prune.l1_unstructured(module, "weight", amount=0.3)
    return model


def parametrized(folder):
    model = load(folder)
    for module in linears(model):
        parametrizations.weight_norm(module)
    return model


def averaged(folder):
    model = load(folder)
    mean = torch.optim.swa_utils.AveragedModel(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    mean.update_parameters(model)
    mean.update_parameters(model)
    return mean


PROGRAMS = {
    "torchao int8 weights": weights_in("Int8WeightOnlyConfig"),
    "torchao float8 weights": weights_in("Float8WeightOnlyConfig"),
    "torchao int8 activations and weights": weights_in("Int8DynamicActivationInt8WeightConfig"),
    "torchao QAT": qat,
    "pruning": pruned,
    "weight norm": parametrized,
    "AveragedModel": averaged,
}


@pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "no gradients"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_changes_m_1_as_it_changes_the_dense_model(folders, program, gradients):
    losses = {}
    for name, folder in folders.items():
        model = PROGRAMS[program](folder)
        with torch.set_grad_enabled(gradients):
            losses[name] = loss_of(model)
    if program != "weight norm":
        assert losses["dense"] != loss_of(load(folders["dense"]))  # it did something
    same(losses)


def float8(model):
    """As on an H100, emulated: in training a Float8Linear stands in for each nn.Linear."""
    pytest.importorskip("torchao.float8")
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig(emulate=True)
    return convert_to_float8_training(model, config=config, module_filter_fn=lambda module, name: name != "lm_head")


TRAINED = {
    "float8 training": (float8, lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3)),
    "QAT": (None, lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3)),
    "Muon": (lambda model: model, lambda model: torch.optim.Muon(matrices(model), lr=1e-3)),
}


def matrices(model):
    return [p for name, p in model.named_parameters() if p.ndim == 2 and "router" not in name]


@pytest.mark.parametrize("program", TRAINED)
def test_a_program_trains_m_1_as_it_trains_the_dense_model(folders, program):
    """Routers, which the dense model has not, stay as they are."""
    prepared, optimizer_of = TRAINED[program]
    losses, gradients = {}, {}
    for name, folder in folders.items():
        model = qat(folder) if prepared is None else prepared(load(folder))
        for key, parameter in model.named_parameters():
            parameter.requires_grad_("router" not in key)
        optimizer = optimizer_of(model)
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            found = [p.grad.norm().item() for key, p in model.named_parameters() if "down_proj" in key]
            losses.setdefault(name, []).append(loss.item())
            gradients.setdefault(name, []).append(math.hypot(*found))
    for step in range(3):
        same({name: found[step] for name, found in losses.items()}, 1e-3)
        same({name: found[step] for name, found in gradients.items()}, 1e-2)
    assert losses["M=2"][2] < losses["M=2"][0]


def test_watermarked_text_is_the_dense_models_and_is_found_out(folders):
    marks = WatermarkingConfig(bias=8.0, seeding_scheme="selfhash")
    texts = {}
    for name, folder in folders.items():
        model = load(folder)
        options = {"watermarking_config": marks, "max_new_tokens": 24, "do_sample": False, "pad_token_id": 258}
        texts[name] = model.generate(IDS[:1, :8], eos_token_id=None, **options)
        detector = WatermarkDetector(model.config, device="cpu", watermarking_config=marks)
        assert detector(texts[name][:, 8:], return_dict=True).prediction[0]
    assert torch.equal(texts["M=1"], texts["dense"])


def test_hessians_are_of_weighted_activations_alone(folders):
    """What a calibrating quantiser's hooks on `down_proj` see: as many rows as tokens, and dense's values at M=1."""

    def hooked(module, see):
        module.register_forward_hook(lambda module, args, output: see(args[0]))

    def pre_hooked(module, see):
        module.register_forward_pre_hook(lambda module, args: see(args[0]))

    def wrapped(module, see):
        forward = module.forward
        module.forward = lambda x: (see(x), forward(x))[1]

    for watch in (hooked, pre_hooked, wrapped):
        for ids in (IDS[:1, :60], IDS[:1, :8]):  # both forms of a sub-layer
            seen = {}
            for name, folder in folders.items():
                model = load(folder)
                for key, module in model.named_modules():
                    if key.endswith("down_proj"):
                        rows = seen.setdefault(name, [])
                        watch(
                            module,
                            lambda x, rows=rows: rows.append((x[..., 0].numel(), x.detach().square().sum().item())),
                        )
                with torch.no_grad():
                    model(copy.deepcopy(ids))
            assert all(count == ids.numel() for found in seen.values() for count, _ in found), (watch.__name__, seen)
            assert [s for _, s in seen["M=1"]] == pytest.approx([s for _, s in seen["dense"]], rel=1e-5)
            assert len(seen["M=2"]) == 2 * len(seen["dense"])
