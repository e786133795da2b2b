"""Checkpoints of strangers: refused in one line, or converted correctly.

Never a traceback, a hang, a stray file, or memory that a small file asks for.
"""

import contextlib
import json
import math
import os
import resource
import shutil
import struct
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from conftest import make_dense
from finedeep.convert import ConversionError, convert_checkpoint, export_checkpoint
from finedeep.convert.receipt import RECEIPT
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_convert import fingerprint, index
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

# Each example converts a whole, if tiny, model; two minutes count as a hang, however busy the machine is.
PROPERTY = settings(
    max_examples=int(os.environ.get("FINEDEEP_HOSTILE_EXAMPLES", "60")),
    deadline=120_000,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
LONG = "x" * 300
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from([0, 1, -1, 2, 10**6, 10**9, 0.5, "", "..", "../../x", "/etc/passwd", LONG, math.nan, math.inf])
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(autouse=True, scope="module")
def bounded_memory():
    """So that a test fails, and not the machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 4 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "dense"
    return make_dense(folder, num_hidden_layers=1, tie_word_embeddings=True)


def outcome(original, damage, **options):
    """Damage a copy of the checkpoint and convert it. Returns the refusal, or None where the result was right."""
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        source = shutil.copytree(original, place / "inside" / "source")
        damage(source)
        before = fingerprint(place)
        refusal = None
        try:
            convert_checkpoint(source, place / "out", num_expert_sublayers=1, progress=False, **options)
        except ConversionError as error:
            refusal = str(error)
        if refusal is not None:
            assert fingerprint(place) == before
            assert not (place / "out").exists()
            assert len(refusal) < 2000
            return refusal
        after = fingerprint(place)
        assert {name for name in after if not name.startswith("out/")} == set(before)
        check_function(source, place / "out")
        return None


def check_function(source, out):
    """The converted model is what transformers makes of the damaged source, wherever it makes anything of it."""
    config = json.loads((source / "config.json").read_text())
    config.pop("num_labels", None)  # of which transformers makes a dictionary, however many are said to be there
    (source / "config.json").write_text(json.dumps(config))
    if "rope_parameters" in config and transformers.__version__ < "5":
        return  # which transformers 4 does not read; Finedeep does
    ids = torch.arange(20)[None]
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(out).eval()(ids).logits
        try:
            expected = LlamaForCausalLM.from_pretrained(source).eval()(ids).logits
        except Exception:
            return
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3, equal_nan=True)


def write_json(name, content):
    return lambda folder: (folder / name).write_text(json.dumps(content), encoding="utf-8", errors="surrogatepass")


CONFIG_FIELDS = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
    head_dim hidden_act max_position_embeddings initializer_range rms_norm_eps rope_theta rope_scaling rope_parameters
    attention_bias mlp_bias tie_word_embeddings pad_token_id bos_token_id eos_token_id architectures model_type dtype
    torch_dtype id2label num_labels layer_types sliding_window no_rope_layers auto_map quantization_config
    partial_rotary_factor attention_dropout qk_norm residual_multiplier use_cache transformers_version""".split()


@PROPERTY
@given(changes=st.dictionaries(st.sampled_from(CONFIG_FIELDS), JSON, min_size=1, max_size=3))
@example(changes={"num_hidden_layers": 10**6})
@example(changes={"num_labels": 10**12})
@example(changes={"rope_theta": 0})
@example(changes={"head_dim": 2**40})
@example(changes={"rms_norm_eps": "small"})
@example(changes={"hidden_act": "softmax"})
@example(changes={"auto_map": {"AutoConfig": "evil.Evil"}})
@example(changes={"rope_parameters": {"rope_type": "yarn", "factor": math.inf}})
def test_configs(original, changes):
    content = json.loads((original / "config.json").read_text())
    outcome(original, write_json("config.json", {**content, **changes}))


@PROPERTY
@given(content=JSON)
def test_configs_that_are_anything(original, content):
    assert outcome(original, write_json("config.json", content))


def test_a_config_of_ten_megabytes(original):
    content = json.loads((original / "config.json").read_text())
    outcome(original, write_json("config.json", {**content, "padding": "x" * 10**7}))
    assert outcome(original, write_json("config.json", {**content, "architectures": [{"a": []}] * 10**4})) is not False
    assert "not valid JSON" in outcome(original, lambda folder: (folder / "config.json").write_text("[" * 10**6))


SHARD_NAMES = st.sampled_from(
    ["../../x", "/etc/passwd", "..", ".", "", "model.safetensors\0", "inside/model.safetensors", "config.json", LONG]
)


@PROPERTY
@given(shard=SHARD_NAMES | st.text(max_size=20) | JSON, names=st.integers(1, 20))
def test_indexes(original, shard, names):
    """Some tensors are said to be in a file that is not there, or is no plain file of the folder."""
    tensors = list(load_file(original / "model.safetensors"))
    weight_map = dict.fromkeys(tensors, "one.safetensors") | dict.fromkeys(tensors[:names], shard)
    refusal = outcome(original, index({"weight_map": weight_map}))
    assert refusal or shard == "one.safetensors"


@PROPERTY
@given(content=JSON)
def test_indexes_that_are_anything(original, content):
    assert outcome(original, index({"weight_map": content}))
    assert outcome(original, index(content))


def header_of(folder):
    data = (folder / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def put_header(folder, header, data, size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)


ENTRY_CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F16", "F64", "I8", "BF16", "Q4", "", 7]) | JSON,
        "shape": st.lists(st.integers(-3, 2**66), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-5, 2**66), min_size=1, max_size=3) | JSON,
    },
).filter(bool)


@PROPERTY
@given(which=st.integers(0, 11), changes=ENTRY_CHANGES)
@example(which=3, changes={"data_offsets": [0, 4096]})
@example(which=3, changes={"shape": [2**33, 2**33]})
def test_headers(original, which, changes):
    header, data = header_of(original)
    name = [name for name in header if name != "__metadata__"][which % (len(header) - 1)]
    header[name] = {**header[name], **changes}
    outcome(original, lambda folder: put_header(folder, header, data))


@PROPERTY
@given(size=st.integers(0, 2**64 - 1) | st.integers(0, 3000))
def test_header_lengths(original, size):
    header, data = header_of(original)
    outcome(original, lambda folder: put_header(folder, header, data, size))


@PROPERTY
@given(data=st.data())
def test_bytes_flipped_in_the_header(original, data):
    content = bytearray((original / "model.safetensors").read_bytes())
    size = struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 7 + size))] = data.draw(st.integers(0, 255))
    outcome(original, lambda folder: (folder / "model.safetensors").write_bytes(content))


@PROPERTY
@given(kept=st.floats(0, 1))
def test_truncated_files(original, kept):
    content = (original / "model.safetensors").read_bytes()
    cut = content[: int(kept * (len(content) - 1))]
    assert outcome(original, lambda folder: (folder / "model.safetensors").write_bytes(cut))


def test_one_name_in_two_shards(original):
    """Which of the two would be meant? The index says, but the files disagree with it."""

    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        norm = {"model.norm.weight": tensors["model.norm.weight"]}
        save_file(tensors, folder / "a.safetensors")
        save_file(norm, folder / "b.safetensors")
        weight_map = dict.fromkeys(tensors, "a.safetensors") | {"model.norm.weight": "b.safetensors"}
        write_json("model.safetensors.index.json", {"weight_map": weight_map})(folder)

    assert "does not hold the tensors" in outcome(original, damage)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_links_out_of_the_folder_are_not_followed(original, name):
    def damage(folder):
        target = folder.parent / "elsewhere"
        if not (folder / name).exists():
            tensors = load_file(folder / "model.safetensors")
            index({"weight_map": dict.fromkeys(tensors, "one.safetensors")})(folder)
        (folder / name).rename(target)
        (folder / name).symlink_to(target)

    assert "is a link out of its folder" in outcome(original, damage)


def test_links_of_the_hubs_cache_are_followed(original, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / ("0" * 40)
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for file in original.iterdir():
        shutil.copyfile(file, blobs / f"{file.name}-blob")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{file.name}-blob")
    convert_checkpoint(snapshot, tmp_path / "out", num_expert_sublayers=1, progress=False)
    check_function(original, tmp_path / "out")


WORK = ".out.unfinished"
NAMES = "result training model.safetensors plan.json lock calibrated-0.safetensors x".split()
FOREIGN = st.lists(st.sampled_from(NAMES) | st.text("ab.*[]~", min_size=1), min_size=1, max_size=3).map("/".join)


@pytest.fixture(scope="module")
def states(original, tmp_path_factory):
    """What may lie there before: a finished run, and a stopped one."""
    place = tmp_path_factory.mktemp("states")
    convert_checkpoint(original, place / "out", num_expert_sublayers=1, progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finedeep.convert.conversion.write_receipt", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(original, place / "stopped", num_expert_sublayers=1, progress=False)
    (place / ".stopped.unfinished").rename(place / WORK)
    return place


@settings(PROPERTY, max_examples=PROPERTY.max_examples // 2)
@given(
    there=st.sets(st.sampled_from(["out", WORK])),
    foreign=st.dictionaries(st.tuples(st.sampled_from(["", "out", WORK]), FOREIGN), st.booleans(), max_size=3),
    resume=st.booleans(),
    overwrite=st.booleans(),
)
@example(there=set(), foreign={(WORK, "lock"): False}, resume=False, overwrite=True)
@example(there={WORK}, foreign={(WORK, "calibrated-0.safetensors"): False}, resume=False, overwrite=True)
@example(there=set(), foreign={("", WORK): True}, resume=False, overwrite=True)
@example(there=set(), foreign={("", "out"): True}, resume=False, overwrite=True)
@example(there={"out"}, foreign={("out", "x"): True}, resume=False, overwrite=True)
@example(there={WORK}, foreign={(WORK, "result/x"): False}, resume=True, overwrite=False)
@example(there={"out", WORK}, foreign={}, resume=True, overwrite=True)
def test_what_lies_at_the_destination_and_in_the_hidden_folder(original, states, there, foreign, resume, overwrite):
    """Files and links of others, there and beside: none is ever touched, nor what a link leads to."""
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        (place / "victim").mkdir()
        (place / "victim/thesis.txt").write_text("years of work")
        for name in there:
            shutil.copytree(states / name, place / name)
        put = {}
        for (folder, name), link in foreign.items():
            path = place / folder / name
            if os.path.lexists(path) or ".." in path.parts or "victim" in path.parts:
                continue
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.symlink_to(place / "victim") if link else path.write_text("mine")
            except OSError:  # beneath a file or a link of those
                continue
            put[path] = os.readlink(path) if link else "mine"
        how = {"num_expert_sublayers": 1, "progress": False, "resume": resume, "overwrite": overwrite}
        with contextlib.suppress(ConversionError):
            convert_checkpoint(original, place / "out", **how)
            assert (place / "out/model.safetensors").is_file()
            assert not (place / WORK).exists()
        for path, content in put.items():
            assert content == (os.readlink(path) if path.is_symlink() else path.read_text()), path
        assert [path.name for path in (place / "victim").iterdir()] == ["thesis.txt"]
        ours = {"out", WORK, "victim", *(path.relative_to(place).parts[0] for path in put)}
        assert {path.name for path in place.iterdir()} <= ours


def same_tokens(source, out):
    """Whether AutoTokenizer gives the same tokens for both, or nothing for the source."""
    try:
        expected = AutoTokenizer.from_pretrained(source, trust_remote_code=False)(TEXT)["input_ids"]
    except Exception:  # a stranger's files, and classes of many kinds
        return True
    try:
        return AutoTokenizer.from_pretrained(out, trust_remote_code=False)(TEXT)["input_ids"] == expected
    except Exception:
        return False


TEXT = "Hello <s> [X] 3.14\n"
TOKENIZER_FIELDS = """tokenizer_class add_bos_token add_eos_token bos_token eos_token unk_token pad_token legacy
    added_tokens_decoder clean_up_tokenization_spaces model_max_length chat_template padding_side auto_map
    extra_special_tokens add_prefix_space backend model_input_names""".split()
TOKENIZER_CLASSES = "LlamaTokenizer LlamaTokenizerFast GPT2Tokenizer TokenizersBackend Qwen2Tokenizer No".split()
TOKENS = st.sampled_from(["<s>", "[X]", "H", "", LONG, {"content": "[X]"}, {"__type": "AddedToken", "content": "[X]"}])
IDS = st.integers(-2, 300) | st.sampled_from([2**31, 2**63, "1", [1, 2], [], None])


@settings(PROPERTY, max_examples=max(PROPERTY.max_examples // 6, 1))
@given(
    fields=st.dictionaries(
        st.sampled_from(TOKENIZER_FIELDS), JSON | TOKENS | st.sampled_from(TOKENIZER_CLASSES), max_size=3
    ),
    ids=st.dictionaries(st.sampled_from(["bos_token_id", "eos_token_id", "pad_token_id"]), IDS, max_size=2),
    added=st.lists(st.tuples(st.integers(0, 400), TOKENS.filter(lambda token: isinstance(token, str))), max_size=2),
    missing=st.sampled_from(["", "tokenizer.json", "tokenizer_config.json"]),
)
@example(fields={}, ids={"bos_token_id": 2**63}, added=[], missing="")
@example(fields={"tokenizer_class": "LlamaTokenizer"}, ids={}, added=[(300, "[X]")], missing="")
@example(fields={"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}, ids={}, added=[], missing="")
def test_tokenizers_that_disagree_with_the_model(original, fields, ids, added, missing):
    """Another class, tokens beyond the vocabulary, ids that are none, files that are not there.

    Where the source's tokenizer loads, the converted folder's gives the same tokens, or a warning says that it doesn't.
    """

    def damage(folder):
        for name, changes in (("tokenizer_config.json", fields), ("config.json", ids)):
            write_json(name, {**json.loads((folder / name).read_text()), **changes})(folder)
        content = json.loads((folder / "tokenizer.json").read_text())
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        content["added_tokens"] += [{"id": i, "content": token, "special": True, **flags} for i, token in added]
        write_json("tokenizer.json", content)(folder)
        if missing:
            (folder / missing).unlink()

    with tempfile.TemporaryDirectory() as place:
        source, out = shutil.copytree(original, Path(place) / "source"), Path(place) / "out"
        damage(source)
        before = fingerprint(source)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            refusal = ""
            try:
                convert_checkpoint(source, out, num_expert_sublayers=1, progress=False)
            except ConversionError as error:
                refusal = str(error)
        assert fingerprint(source) == before
        assert {path.name for path in Path(place).iterdir()} == {"source", *([] if refusal else ["out"])}
        assert len(refusal) < 2000
        assert refusal or same_tokens(source, out) or any("okenizer" in str(warning.message) for warning in told)


def test_pickles_beside_safetensors_are_never_opened(original):
    def damage(folder):
        for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
            (folder / name).write_bytes(b"cposix\nsystem\n(S'touch /tmp/finedeep-was-here'\ntR.")

    assert outcome(original, damage) is None
    assert not Path("/tmp/finedeep-was-here").exists()


@pytest.fixture(scope="module")
def exact(original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "exact"
    convert_checkpoint(original, folder, num_expert_sublayers=1, progress=False)
    return folder


def at(content, keys, value):
    """A copy of nested dictionaries with another value at one place."""
    return {**content, keys[0]: at(content[keys[0]], keys[1:], value) if keys[1:] else value}


OPTIONS = "num_expert_sublayers num_experts_per_sublayer mode assignment seed routing_function dtype".split()
PLACES = st.sampled_from(
    [("options",), ("source",), ("source", "config"), ("source", "model_type")]
    + [("options", name) for name in OPTIONS]
    + [("source", "config", name) for name in CONFIG_FIELDS]
)


@PROPERTY
@given(file=st.sampled_from(["config.json", RECEIPT, "both"]), keys=PLACES, value=JSON)
@example(file="both", keys=("source", "config", "num_hidden_layers"), value=10**6)
@example(file="both", keys=("source", "config", "intermediate_size"), value=2**40)
@example(file="both", keys=("source", "config", "num_labels"), value=10**12)
@example(file=RECEIPT, keys=("options", "num_experts_per_sublayer"), value=2**40)
@example(file=RECEIPT, keys=("options", "seed"), value="0")
@example(file="config.json", keys=("source", "config", "quantization_config"), value=[])
def test_what_is_exported(exact, file, keys, value):
    """Configuration, receipt, or both in the same way."""
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        source = shutil.copytree(exact, place / "source")
        places = {"config.json": keys[-1:], RECEIPT: keys}
        for name in places if file == "both" else [file]:
            write_json(name, at(json.loads((source / name).read_text()), places[name], value))(source)
        before = fingerprint(place)
        refusal = ""
        try:
            export_checkpoint(source, place / "out", progress=False)
        except ConversionError as error:
            refusal = str(error)
        after = {name: found for name, found in fingerprint(place).items() if not name.startswith("out/")}
        assert after == before
        assert len(refusal) < 2000
        assert (place / "out").exists() == (not refusal)
