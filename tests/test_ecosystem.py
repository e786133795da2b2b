"""What users do with a Llama, done with a Finedeep: adapters, checkpointing, compilation, other heads."""

import pytest
import torch
import transformers
from conftest import TINY, random_model
from finedeep import FinedeepConfig, FinedeepForCausalLM
from finedeep.convert.code_files import CODE_FILES
from isolated import run_isolated


@pytest.fixture
def ids():
    return torch.randint(0, 256, (2, 50), generator=torch.Generator().manual_seed(0))


def gradients(model, ids):
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(ids, reentrant):
    model = random_model().train()
    expected = gradients(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    found = gradients(model, ids)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


def test_eager_and_sdpa_attention_agree_and_outputs_are_recorded(ids):
    model = random_model().eval()
    with torch.no_grad():
        expected = model(ids).logits
        model.set_attn_implementation("eager")
        out = model(ids, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(out.logits, expected, rtol=1e-4, atol=1e-4)
    assert len(out.hidden_states) == 3
    assert len(out.attentions) == 2
    assert out.attentions[0].shape == (2, 4, 50, 50)


def test_compiles_as_one_graph_without_a_new_one_for_each_length(ids):
    model = random_model().eval()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for length in (40, 41, 57, 33, 50, 29):
            compiled(ids[:, :length], use_cache=False)
        found = compiled(ids, use_cache=False).logits
        torch.testing.assert_close(found, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert len(graphs) <= 2  # the first length, then any length


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="this torch does not say when it exports")
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_graph_is_of_any_length(ids, strict):
    """Both below and above `definition_max_tokens`, between which the model itself changes its form."""
    model, lengths = random_model(), (5, 60)
    where = {"input_ids": {1: torch.export.Dim("seq", min=2, max=100)}}
    with torch.no_grad():
        exported = torch.export.export(
            model,
            (),
            {"input_ids": ids[:1, :40], "use_cache": False},
            dynamic_shapes={**where, "use_cache": None},
            strict=strict,
        ).module()
        for length in lengths:
            text = torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(1))
            found = exported(input_ids=text, use_cache=False)
            torch.testing.assert_close(found.logits, model(text).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_follows_float32(ids, dtype):
    model = random_model().eval()
    with torch.no_grad():
        expected = model(ids).logits
        found = model.to(dtype)(ids).logits
    assert found.dtype == dtype
    assert (found.float() - expected).abs().max() < 0.1 * expected.std()


def test_embeddings_can_be_resized(ids):
    model = random_model(tie_word_embeddings=True)
    model.resize_token_embeddings(300)
    assert model(ids).logits.shape[-1] == 300
    assert model.lm_head.weight is model.model.embed_tokens.weight


SAVE_AND_RELOAD = """
import json, pathlib, torch, transformers
source, place, *names = sys.argv[1:]
ids = torch.arange(20)[None]
answer = {}
for name in names:
    auto, target = getattr(transformers, name), pathlib.Path(place) / name
    torch.manual_seed(0)
    model = auto.from_pretrained(source, trust_remote_code=True).eval()
    model.save_pretrained(target)
    again, info = auto.from_pretrained(target, trust_remote_code=True, output_loading_info=True)
    before, after = model(ids)[0], again.eval()(ids)[0]
    answer[name] = {
        "equal": torch.equal(before, after),
        "missing": sorted(info["missing_keys"]),
        "auto_map": json.loads((target / "config.json").read_text())["auto_map"],
        "code": sorted(p.name for p in target.glob("*.py")),
    }
"""
TASKS = ("CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")
HEADS = ("AutoModel", *(f"AutoModelFor{task}" for task in TASKS))


@pytest.fixture(scope="module")
def saved_again(converted, tmp_path_factory):
    return run_isolated(SAVE_AND_RELOAD, converted, tmp_path_factory.mktemp("heads"), *HEADS)


@pytest.mark.parametrize("head", HEADS)
def test_every_head_saves_itself_whole(saved_again, head):
    found = saved_again[head]
    assert found["equal"]
    assert found["missing"] == []
    assert found["code"] == [file.name for file in CODE_FILES]
    assert found["auto_map"]["AutoModelForCausalLM"] == "modeling_finedeep.FinedeepForCausalLM"
    assert len(found["auto_map"]) == 6


def test_trainer_trains(tmp_path, ids):
    pytest.importorskip("accelerate")
    model = FinedeepForCausalLM(FinedeepConfig(**{**TINY, "intermediate_size": 48}))
    rows = [{"input_ids": row, "labels": row} for row in ids.repeat(8, 1)]
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=30, learning_rate=1e-2, report_to=[], disable_tqdm=True, use_cpu=True, logging_steps=10
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    before = model(ids, labels=ids).loss.item()
    trainer.train()
    assert model.eval()(ids, labels=ids).loss.item() < before - 1
    routers = [layer.sublayers[0].router for layer in model.model.layers]
    assert all(router.abs().max() > 0 for router in routers)  # they start at zero and must not stay there
