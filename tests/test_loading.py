"""The folder alone is enough: everything here runs in processes that cannot import the project."""

import pytest
from conftest import make_dense
from finedeep.convert import convert_checkpoint
from isolated import run_isolated

AUTO_CLASSES = """
import transformers
from transformers import AutoConfig
folder = sys.argv[1]
answer = {"config": type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__name__}
for auto in ("AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification",
             "AutoModelForTokenClassification", "AutoModelForQuestionAnswering"):
    model, info = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    answer[auto] = [type(model).__name__, sorted(info["missing_keys"])]
"""

SAVE_TWICE = """
import hashlib, pathlib
from transformers import AutoModelForCausalLM, AutoTokenizer
digests = []
source = sys.argv[1]
for copy in sys.argv[2:]:
    AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True).save_pretrained(copy)
    AutoTokenizer.from_pretrained(source).save_pretrained(copy)
    digests.append({p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in pathlib.Path(copy).iterdir()})
    source = copy
answer = digests
"""

GENERATE = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
prompts = ["A", "The quick brown fox", "Finedeep stacks experts in sub-layers"]

def tokens(prompts, **options):
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    with torch.no_grad():
        out = model.generate(**batch, max_new_tokens=24, do_sample=False, eos_token_id=None, **options)
    return out[:, batch.input_ids.shape[1]:].tolist()

answer = {
    "single": [tokens([p])[0] for p in prompts],
    "batched": tokens(prompts),
    "uncached": tokens(prompts, use_cache=False),
    "static": tokens(prompts, cache_implementation="static", disable_compile=True),
}
"""


def test_every_auto_class_loads(converted):
    loaded = run_isolated(AUTO_CLASSES, converted)
    assert loaded == {
        "config": "FinedeepConfig",
        "AutoModel": ["FinedeepModel", []],
        "AutoModelForCausalLM": ["FinedeepForCausalLM", []],
        "AutoModelForSequenceClassification": ["FinedeepForSequenceClassification", ["score.weight"]],
        "AutoModelForTokenClassification": ["FinedeepForTokenClassification", ["score.bias", "score.weight"]],
        "AutoModelForQuestionAnswering": ["FinedeepForQuestionAnswering", ["qa_outputs.bias", "qa_outputs.weight"]],
    }


@pytest.mark.parametrize("tied", [False, True])
def test_saving_again_gives_the_same_bytes(tmp_path, tied):
    dense = make_dense(tmp_path / "dense", tie_word_embeddings=tied)
    convert_checkpoint(dense, tmp_path / "out", progress=False)
    first, second = run_isolated(SAVE_TWICE, tmp_path / "out", tmp_path / "first", tmp_path / "second")
    assert first == second
    assert {"configuration_finedeep.py", "modeling_finedeep.py", "config.json", "model.safetensors"} <= set(first)
    # and the converter wrote what transformers writes
    for name in ("model.safetensors", "configuration_finedeep.py", "modeling_finedeep.py", "config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


@pytest.mark.parametrize("sublayers", [1, 2])
def test_generation_is_one_function_however_it_is_run(tmp_path, dense, sublayers):
    convert_checkpoint(dense, tmp_path / "out", num_expert_sublayers=sublayers, progress=False)
    texts = run_isolated(GENERATE, tmp_path / "out")
    assert len({tuple(t) for t in texts["single"]}) == 3
    assert texts["batched"] == texts["uncached"] == texts["static"] == texts["single"]
