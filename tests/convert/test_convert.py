"""Conversion: exact where it must be, complete, and refused in one line where it cannot be done."""

import hashlib
import itertools
import json
import os
import re
import shutil
import struct
import subprocess
import warnings

import pytest
import torch
from conftest import TINY, make_dense
from finedeep.convert import ConversionError, convert_checkpoint, export_checkpoint, plan
from finedeep.convert.assignment import PADDING, deal
from finedeep.convert.conversion import plan_conversion
from finedeep_cli import main
from forked import run_command
from hub_server import running_hub
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def assert_same_logits(dense_folder, folder, tolerance=1e-4):
    ids = torch.randint(0, 256, (2, 50), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = LlamaForCausalLM.from_pretrained(dense_folder).eval()(ids).logits
        found = load(folder)(ids).logits
    assert expected.std() > 0.1  # a model whose logits are all alike would prove nothing
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


VARIANTS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "multi-head": {"num_key_value_heads": 4},
    "wide heads": {"head_dim": 16},
    "llama3 rope": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "gelu": {"hidden_act": "gelu"},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("routing_function", ["sigmoid", "softmax"])
def test_one_sublayer_gives_the_dense_logits(tmp_path, variant, routing_function):
    dense = make_dense(tmp_path / "dense", **VARIANTS[variant])
    done = convert_checkpoint(
        dense,
        tmp_path / "out",
        num_expert_sublayers=1,
        num_experts_per_sublayer=8,
        routing_function=routing_function,
        routing_input="hidden_state" if routing_function == "softmax" else "expert_output",
        progress=False,
    )
    assert done.padded_neurons == 4
    assert_same_logits(dense, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"num_expert_sublayers": 2, "num_experts_per_sublayer": 50},
            r"56 of padding \(127%\); K=22 is the nearest without",
        ),
        (
            {"num_expert_sublayers": 2, "num_experts_per_sublayer": 50, "mode": "grow"},
            r"6 of padding \(14%\); K=44 is the nearest without",
        ),
        ({"num_expert_sublayers": 3}, r"4 of padding \(9%\); no K goes without, with M=3"),
        ({"num_experts_per_sublayer": 8}, None),  # four of 48
    ],
    ids=str,
)
def test_much_padding_is_told_with_a_k_that_needs_none(tmp_path, dense, options, words, monkeypatch):
    if words and "no K" in words:
        monkeypatch.setattr(plan, "MUCH_PADDING", 0.05)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        convert_checkpoint(dense, tmp_path / "out", progress=False, **options)
    found = [str(warning.message) for warning in told if "padding" in str(warning.message)]
    assert len(found) == (words is not None)
    if words:
        assert re.search(words, found[0])
        assert found[0] in plan_conversion(dense, **options).text()


def test_sharded_input_gives_the_same_bytes(tmp_path, dense):
    sharded = make_dense(tmp_path / "sharded", shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    for source, out in ((dense, "one"), (sharded, "many")):
        convert_checkpoint(source, tmp_path / out, progress=False)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "many/model.safetensors").read_bytes()


def test_output_is_sharded_with_an_index(tmp_path, dense):
    convert_checkpoint(dense, tmp_path / "out", num_expert_sublayers=1, max_shard_size="20KB", progress=False)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert {f.name for f in files} == set(index["weight_map"].values())
    assert_same_logits(dense, tmp_path / "out")


def test_every_neuron_is_used_once():
    for width, M, K in itertools.product((1, 16, 44, 172), (1, 2, 4), (1, 3, 8)):
        neurons = deal(torch.arange(width), M, K)
        assert neurons.shape[:2] == (M, K)
        assert sorted(neurons[neurons != PADDING].tolist()) == list(range(width))
        assert neurons.shape[2] == -(-width // (M * K))


def test_weights_of_a_split_are_the_dense_weights(tmp_path, dense):
    """M=2: not the dense function, but each neuron's three vectors are the dense model's, in some place."""
    convert_checkpoint(dense, tmp_path / "out", num_expert_sublayers=2, num_experts_per_sublayer=2, progress=False)
    before, after = load_file(dense / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    for i in range(2):
        layer = f"model.layers.{i}"
        for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            parts = [after[f"{layer}.sublayers.{m}.{name}.weight"] for m in range(2)]
            assert torch.equal(torch.cat(parts, dim), before[f"{layer}.mlp.{name}.weight"])
        for m in range(2):
            norm = before[f"{layer}.post_attention_layernorm.weight"]
            assert torch.equal(after[f"{layer}.sublayers.{m}.norm.weight"], norm)
            assert not after[f"{layer}.sublayers.{m}.router"].any()


@pytest.mark.parametrize(("M", "K"), [(1, 8), (2, 8), (4, 3)])
@torch.no_grad()
def test_sublayers_of_a_split_sum_to_the_dense_ffn(tmp_path, M, K):
    """On one and the same input, which is the sense in which a cut keeps the FFN; biases and padding included."""
    dense = make_dense(tmp_path / "dense", mlp_bias=True)
    convert_checkpoint(dense, tmp_path / "out", num_expert_sublayers=M, num_experts_per_sublayer=K, progress=False)
    h = torch.randn(3, 40, 32)
    dense_layers, layers = LlamaForCausalLM.from_pretrained(dense).model.layers, load(tmp_path / "out").model.layers
    for dense_layer, layer in zip(dense_layers, layers, strict=True):
        expected = dense_layer.mlp(dense_layer.post_attention_layernorm(h))
        found = sum(sublayer(h)[0] for sublayer in layer.sublayers)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_kept(tmp_path, dtype):
    dense = make_dense(tmp_path / "dense", dtype=dtype)
    convert_checkpoint(dense, tmp_path / "out", num_expert_sublayers=1, progress=False)
    assert {t.dtype for t in load_file(tmp_path / "out/model.safetensors").values()} == {dtype}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == dtype


@pytest.mark.parametrize(("stored", "named"), [(torch.float32, "bfloat16"), (torch.bfloat16, "float32")], ids=str)
def test_config_and_file_of_two_dtypes_load_alike(tmp_path, stored, named):
    """transformers 5 loads in the configuration's, and rounds what the file has. There and back it stays so."""
    dense = make_dense(tmp_path / "dense", dtype=stored)
    edit_config(dtype=named)(dense)
    convert_checkpoint(dense, tmp_path / "there", num_expert_sublayers=1, num_experts_per_sublayer=4, progress=False)
    export_checkpoint(tmp_path / "there", tmp_path / "back", progress=False)
    folders = [dense, tmp_path / "there", tmp_path / "back"]
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval() for folder in folders]
    assert {model.dtype for model in models} == {getattr(torch, named)}
    for folder in folders:
        assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {stored}
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected, *others = (model(ids).logits.float() for model in models)
    for logits in others:
        torch.testing.assert_close(logits, expected, rtol=0, atol=0.2 if named == "bfloat16" else 1e-4)


def test_companions_come_along(dense, converted):
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (dense, converted)]
    assert tokenizers[0]("Hello, world")["input_ids"] == tokenizers[1]("Hello, world")["input_ids"]
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    assert (converted / "generation_config.json").read_bytes() == (dense / "generation_config.json").read_bytes()


def sentencepiece_like(folder, **config):
    """As Mistral's and Phi-3's are: the file has its own rule for the "▁" before a text, the class named another."""
    letters = [*map(chr, range(33, 127)), "▁", "▁▁", "\n"]
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    ids = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(ids, [("▁", "▁")], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **tokens, **config}))


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("family", ["llama", "mistral", "phi3", "granite"])
def test_the_tokens_are_those_of_the_dense_model(tmp_path, family, legacy):
    """transformers 5 goes by the model's type, and only for some types takes the file as it is."""
    config = CONFIG_MAPPING[family](**TINY | {"vocab_size": 400})
    MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).save_pretrained(tmp_path / "dense")
    sentencepiece_like(tmp_path / "dense", legacy=legacy)
    convert_checkpoint(tmp_path / "dense", tmp_path / "out", num_expert_sublayers=1, progress=False)
    before, after = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("dense", "out"))
    for text in ("Hello, world", " = Robert = ", "Hello</s>\nHi</s> you", "a  b", ""):
        assert before(text)["input_ids"] == after(text)["input_ids"], text
        assert before(text).keys() == after(text).keys()
    assert (before.bos_token, before.eos_token) == (after.bos_token, after.eos_token) == ("<s>", "</s>")


@pytest.mark.parametrize(
    "command",
    [
        ("convert", "source", "out", "--sublayers=2", "--calibrate", "text.txt"),
        pytest.param(("convert", "source", "out"), marks=pytest.mark.slow),
        ("eval", "source", "--local", "."),
        pytest.param(("inspect", "source", "--text", "text.txt"), marks=pytest.mark.slow),
    ],
    ids=lambda command: " ".join(command[::2]),
)
def test_a_tokenizers_code_is_not_run_whatever_is_answered(tmp_path, dense, command):
    """transformers asks whether to, where nobody has said no."""
    source = shutil.copytree(dense, tmp_path / "source")
    config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "evil.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nclass Evil: pass")
    (tmp_path / "text.txt").write_text("There was a text. It was not long. " * 200)
    (done,) = run_command(command, cwd=tmp_path, said="y\n" * 9)
    assert done.returncode == 0 or "contains custom code" in done.stderr, done  # so far it has come
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_is_a_riddle_costs_no_weights(tmp_path, dense, monkeypatch):
    """As one of mistral-common, which lacks much of what others have."""
    monkeypatch.setattr("finedeep.convert.tokenization._loaded", lambda folder: object())
    with pytest.warns(UserWarning, match="was copied as it is"):
        convert_checkpoint(dense, tmp_path / "out", num_expert_sublayers=1, progress=False)
    monkeypatch.undo()
    assert_same_logits(dense, tmp_path / "out")
    assert (tmp_path / "out/tokenizer_config.json").exists()


def test_no_foreign_code_is_named(tmp_path, dense):
    source = shutil.copytree(dense, tmp_path / "source")
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((source / name).read_text())
        content["auto_map"] = {"AutoTokenizer": ["stranger/repo--evil.Tokenizer", None]}
        (source / name).write_text(json.dumps(content))
    (source / "evil.py").write_text("raise SystemExit('run')")
    convert_checkpoint(source, tmp_path / "out", progress=False)
    assert not (tmp_path / "out/evil.py").exists()
    assert not any("stranger" in path.read_text() for path in (tmp_path / "out").glob("*.json"))


def test_recomputed_and_redundant_tensors_are_allowed(tmp_path):
    dense = make_dense(tmp_path / "dense", tie_word_embeddings=True)
    tensors = load_file(dense / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    convert_checkpoint(dense, tmp_path / "out", num_expert_sublayers=1, progress=False)
    assert_same_logits(dense, tmp_path / "out")


def test_a_hub_id_is_fetched_without_its_code(tmp_path, dense):
    """Over real HTTP; only configuration, weights and companions are asked for."""
    files = {path.name: path.read_bytes() for path in dense.iterdir()}
    files |= {"evil.py": b"raise SystemExit", "pytorch_model.bin": b"pickle"}
    files |= {"consolidated.safetensors": b"the same weights in another form"}
    gemma = {**files, "config.json": json.dumps({"model_type": "gemma2"}).encode()}
    with running_hub() as (hub, environment):
        hub.repositories |= {"org/dense": [files], "org/gemma": [gemma]}
        environment |= {"HF_HOME": str(tmp_path / "hub")}
        for name, status, words in (
            ("org/gemma", 2, "org/gemma has model_type 'gemma2', which cannot be converted"),
            ("org/dense", 0, ""),
        ):
            (done,) = run_command(["convert", name, tmp_path / "out", "--sublayers", "1", "--quiet"], environment)
            assert (done.returncode, done.stdout) == (status, ""), done.stderr
            assert words in done.stderr
        fetched = {path.rsplit("/", 1)[1] for _, path in hub.requests if "/resolve/" in path}
        assert not [path for _, path in hub.requests if path.startswith("/org/gemma") and path.endswith(".safetensors")]
    assert "model.safetensors" in fetched
    assert not {"evil.py", "pytorch_model.bin", "consolidated.safetensors"} & fetched
    assert_same_logits(dense, tmp_path / "out")


# --- bad input -------------------------------------------------------------------------------------------------------


def edit_config(**changes):
    def edit(folder):
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, **changes}))

    return edit


def edit_tensors(change):
    def edit(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def overwrite(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def only_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def index(content):
    """The weights are in `one.safetensors`, and this is the index."""

    def damage(folder):
        (folder / "model.safetensors").rename(folder / "one.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return damage


def index_of_norm(shard):
    return index({"weight_map": {"model.norm.weight": shard}})


def put(name, tensor):
    return edit_tensors(lambda tensors: tensors.__setitem__(name, tensor))


def poke(value):
    return edit_tensors(lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].view(-1).__setitem__(7, value))


def linked(name):
    def link(folder):
        (folder / name).rename(folder.with_name(name))
        (folder / name).symlink_to(folder.with_name(name))

    return link


NORM = "model.norm.weight"
BAD = {
    "no config": (lambda folder: (folder / "config.json").unlink(), ["config.json", "missing"]),
    "config is not JSON": (overwrite("config.json", b"{"), ["config.json", "not valid JSON"]),
    "config is a list": (overwrite("config.json", b"[]"), ["config.json", "list"]),
    "another architecture": (edit_config(model_type="gemma2"), ["'gemma2'", "llama", "norms multiply by 1 + weight"]),
    "quantised": (edit_config(quantization_config={"quant_method": "awq"}), ["quantization_config"]),
    "heads do not fit": (edit_config(num_attention_heads=5, head_dim=None), ["config.json"]),
    "hidden size is text": (edit_config(hidden_size="wide"), ["config.json"]),
    "pickle only": (only_pickle, ["pytorch_model.bin", "pickled", "save_pretrained"]),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), ["neither", "model.safetensors"]),
    "truncated": (truncate, ["model.safetensors", "not a complete"]),
    "empty weights": (overwrite("model.safetensors", b""), ["model.safetensors", "not a complete"]),
    "corrupt header": (overwrite("model.safetensors", struct.pack("<Q", 9) + b"{not json"), ["not a complete"]),
    "absurd header": (overwrite("model.safetensors", struct.pack("<Q", 2**60) + b"{}"), ["not a complete"]),
    "missing shard": (
        index_of_norm("model-00001-of-00002.safetensors"),
        ["model-00001-of-00002.safetensors", "not there"],
    ),
    "shard outside": (index_of_norm("../../model.safetensors"), ["../../model.safetensors", "plain file name"]),
    "index disagrees": (index_of_norm("one.safetensors"), ["does not hold the tensors"]),
    "index without a map": (index({}), ["weight_map"]),
    "wrong shape": (put(NORM, torch.ones(33)), [NORM, "[33]", "[32]"]),
    "missing tensor": (edit_tensors(lambda tensors: tensors.pop(NORM)), ["lacks", NORM]),
    "unknown tensor": (put("model.extra.weight", torch.ones(3)), ["model.extra.weight"]),
    "integer weights": (put(NORM, torch.ones(32, dtype=torch.int8)), [NORM, "I8", "unquantised"]),
    "NaN": (poke(float("nan")), ["model.layers.1.mlp.up_proj.weight", "1 values", "NaN"]),
    "infinity": (poke(float("inf")), ["model.layers.1.mlp.up_proj.weight", "infinite"]),
    "tied yet different": (edit_config(tie_word_embeddings=True), ["lm_head.weight", "tie_word_embeddings"]),
    "tokenizer config is not JSON": (overwrite("tokenizer_config.json", b"{"), ["tokenizer_config.json", "JSON"]),
    "tokenizer elsewhere": (linked("tokenizer.json"), ["tokenizer.json", "is a link out of its folder"]),
}


def fingerprint(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_refused(capsys, source, destination, words):
    """Through the command: exit code 2, one clear line on stderr, no traceback, nothing at the destination."""
    from finedeep_cli import main

    before = sorted(destination.parent.iterdir())
    capsys.readouterr()  # what making the source has printed
    assert main(["convert", str(source), str(destination), "--quiet"]) == 2
    printed = capsys.readouterr()
    assert re.fullmatch(r"finedeep: error: [^\n]+\n", printed.err)
    assert printed.out == ""
    for word in words:
        assert word in printed.err
    assert sorted(destination.parent.iterdir()) == before


@pytest.mark.parametrize("case", BAD)
def test_bad_source_is_refused_in_one_line(tmp_path, capsys, dense, case):
    damage, words = BAD[case]
    source = shutil.copytree(dense, tmp_path / "source")
    damage(source)
    before = fingerprint(source)
    (tmp_path / "place").mkdir()
    assert_refused(capsys, source, tmp_path / "place" / "out", words)
    assert fingerprint(source) == before


@pytest.mark.parametrize("source", ["./no/such/folder", "no-such-org/no-such-model"])
def test_missing_source(tmp_path, capsys, source):
    assert_refused(capsys, source, tmp_path / "out", [source])


def test_source_is_a_file(tmp_path, capsys, dense):
    assert_refused(capsys, dense / "config.json", tmp_path / "out", ["is a file", "folder"])


def test_destination_in_use(tmp_path, capsys, dense):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("keep me")
    assert_refused(capsys, dense, tmp_path / "out", ["not empty", "ever overwritten"])
    assert (tmp_path / "out/mine.txt").read_text() == "keep me"


def test_destination_is_a_file(tmp_path, capsys, dense):
    (tmp_path / "out").write_text("keep me")
    assert_refused(capsys, dense, tmp_path / "out", ["not a folder"])


@pytest.mark.parametrize("sizes", [("5GB", "20KB"), ("20KB", "5GB")], ids=["whole, then shards", "shards, then whole"])
def test_of_two_layouts_in_a_folder_transformers_is_followed(tmp_path, dense, sizes):
    """A model that was saved twice into one folder leaves the first one's file or index there."""
    source = shutil.copytree(dense, tmp_path / "source")
    model = LlamaForCausalLM.from_pretrained(dense)
    (source / "model.safetensors").unlink()
    for size in sizes:
        model.save_pretrained(source, max_shard_size=size)
        torch.nn.init.normal_(model.model.layers[0].mlp.up_proj.weight)
    names = {path.name for path in source.glob("*.safetensors*")}
    assert {"model.safetensors", "model.safetensors.index.json"} <= names
    convert_checkpoint(source, tmp_path / "out", progress=False)
    assert_same_logits(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--mode", "grow"], "ask for two or more (--sublayers 2"),
        (["--sublayers", "2", "--calibration-tokens", "100"], "add --calibrate"),
        (["--sublayers", "2", "--calibration-steps", "0"], "add --calibrate"),
        (["--assignment-text", "TEXT"], "'contiguous' measures nothing"),
        (["--assignment", "clusters", "--assignment-text", "TEXT"], "'clusters' measures nothing"),
        (["--sublayers", "2", "--calibrate", "self", "--assignment-text", "TEXT"], "calibration's own text"),
    ],
)
def test_options_that_would_do_nothing(tmp_path, capsys, dense, options, words):
    (tmp_path / "text").write_text("A text.")
    given = [str(tmp_path / "text") if word == "TEXT" else word for word in options]
    assert main(["convert", str(dense), str(tmp_path / "out"), *given]) == 2
    assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


@pytest.mark.parametrize("case", ["tokenizer config is not JSON", "tokenizer elsewhere"])
def test_what_is_wrong_with_companions_is_known_before_the_work(tmp_path, dense, case, monkeypatch):
    source = shutil.copytree(dense, tmp_path / "source")
    BAD[case][0](source)
    with pytest.raises(ConversionError, match="tokenizer"):
        plan_conversion(source)


def test_the_current_folder_and_a_mount_are_not_replaced(tmp_path, dense, monkeypatch):
    """A rename to either fails, which would show when all the work is done."""
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(ConversionError, match="is the current folder"):
        convert_checkpoint(dense, ".", progress=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os.path, "ismount", lambda place: str(place) == str(tmp_path / "out"))
    with pytest.raises(ConversionError, match="is a mount point"):
        convert_checkpoint(dense, tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_destination_is_used(tmp_path, dense):
    (tmp_path / "out").mkdir()
    convert_checkpoint(dense, tmp_path / "out", num_expert_sublayers=1, progress=False)
    assert_same_logits(dense, tmp_path / "out")


def test_a_write_that_fails_leaves_what_is_finished(tmp_path):
    """The process may write no file of more than 60 KB: shards with the FFN, which come later, cannot be written."""
    dense = make_dense(tmp_path / "dense", intermediate_size=1200)
    (tmp_path / "place").mkdir()
    command = ["convert", str(dense), str(tmp_path / "place/out"), "--quiet", "--max-shard-size", "50KB"]
    (done,) = run_command(command, largest_file=60_000)
    assert done.returncode == 2
    assert re.fullmatch(r"finedeep: error: [^\n]+File too large[^\n]+\n", done.stderr)
    assert "--resume continues" in done.stderr
    assert [path.name for path in (tmp_path / "place").iterdir()] == [".out.unfinished"]
    convert_checkpoint(dense, tmp_path / "place/out", max_shard_size="50KB", resume=True, progress=False)
    assert [path.name for path in (tmp_path / "place").iterdir()] == ["out"]


def test_a_full_disk_is_known_of_before_anything_is_written(tmp_path, capsys):
    """On a real file system of one megabyte, where the user of the tests may make one."""
    dense = make_dense(tmp_path / "dense", hidden_size=64, intermediate_size=4000)
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a file system of its own size can only be made by root")
    try:
        assert_refused(capsys, dense, disk / "out", ["needs", "MB of disk", "are free", "Make room"])
    finally:
        subprocess.run(["umount", disk], check=True)
