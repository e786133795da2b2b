"""Programs with a test or two each: M=1 beside the dense model, M=2 running."""

import numpy
import pytest
import torch
from three_models import TEXT, load, loss_of, same, token_ids, tokenizer_of
from transformers import QuantoConfig

pytest_plugins = "three_models"


def test_sentence_transformers_encodes_saves_and_loads(folders, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers import models

    texts = [TEXT, TEXT[20:50], "Something else."]
    found = {}
    for name, folder in folders.items():
        word = models.Transformer(
            str(folder), model_args={"trust_remote_code": True}, config_args={"trust_remote_code": True}
        )
        model = library.SentenceTransformer(modules=[word, models.Pooling(word.get_word_embedding_dimension())])
        found[name] = model.encode(texts)
        model.save(str(tmp_path / name))
        again = library.SentenceTransformer(str(tmp_path / name), trust_remote_code=True)
        numpy.testing.assert_allclose(again.encode(texts), found[name], atol=1e-5)
    numpy.testing.assert_allclose(found["M=1"], found["dense"], atol=1e-4)
    assert numpy.isfinite(found["M=2"]).all()


class Logits(torch.nn.Module):
    """Ids to logits: what is exported has neither a cache nor a configuration."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits


def test_an_onnx_file_of_any_length_runs_in_onnxruntime(folders, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    for name, folder in folders.items():
        model, path = load(folder, attn_implementation="sdpa"), str(tmp_path / f"{name}.onnx")
        shapes = ({0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("seq", min=2, max=200)},)
        torch.onnx.export(Logits(model).eval(), (token_ids(),), path, dynamo=True, dynamic_shapes=shapes)
        session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for ids in (token_ids(), token_ids(rows=1, length=7)):
            (logits,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
            numpy.testing.assert_allclose(logits, model(ids).logits.detach().numpy(), rtol=1e-3, atol=1e-3)


def test_quanto_int8(folders):
    pytest.importorskip("optimum.quanto")
    losses = {name: loss_of(load(folder, quantization_config=QuantoConfig("int8"))) for name, folder in folders.items()}
    assert losses["dense"] != loss_of(load(folders["dense"]))
    same(losses)


def test_a_quantised_cache(folders):
    pytest.importorskip("optimum.quanto")
    texts = {}
    for name, folder in folders.items():
        model = load(folder)
        options = {"cache_implementation": "quantized", "cache_config": {"backend": "quanto", "nbits": 4}}
        texts[name] = model.generate(token_ids(rows=1), max_new_tokens=16, do_sample=False, pad_token_id=258, **options)
    assert torch.equal(texts["M=1"], texts["dense"])
    assert texts["M=2"].shape[1] > token_ids(rows=1).shape[1]


def test_nnsight_intervenes_and_reads_gates(folders):
    nnsight = pytest.importorskip("nnsight")
    ids, found = token_ids(rows=1), {}
    for name, folder in folders.items():
        model = nnsight.LanguageModel(load(folder), tokenizer=tokenizer_of(folder))
        with model.trace(ids):
            model.model.layers[0].self_attn.output[0][:] = 0
            if name != "dense":
                gates = model.model.layers[1].sublayers[0].output[1].save()
            logits = model.lm_head.output.save()
        found[name] = logits.detach()
        if name != "dense":
            assert gates.shape == (1, ids.shape[1], load(folder).config.num_experts_per_sublayer)
    torch.testing.assert_close(found["M=1"], found["dense"], rtol=1e-4, atol=1e-4)
    assert not torch.equal(found["dense"], load(folders["dense"])(ids).logits)
