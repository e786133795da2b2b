"""What travels with the weights: every chat template, and a tokenizer that loads without running code."""

import json
import shutil

import pytest
import transformers
from conftest import make_dense
from finedeep.convert import ConversionError, convert_checkpoint, export_checkpoint
from finedeep.convert.heal import heal
from finedeep_cli import main
from isolated import run_isolated
from test_healing import QUICK
from transformers import AutoTokenizer

TOOLS = "TOOLS {{ tools }} {{ messages }}"
MORE = "additional_chat_templates/tool_use.jinja"


def with_tools(folder):
    """What a folder's tokenizer makes of a question with tools."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tools=[{"name": "f"}], tokenize=False)


@pytest.fixture(scope="module")
def two_templates(dense, tmp_path_factory):
    folder = shutil.copytree(dense, tmp_path_factory.mktemp("templates") / "dense")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": TOOLS}
    tokenizer.save_pretrained(folder)
    assert (folder / MORE).is_file()
    return folder


def test_chat_templates_beside_the_default_stay(tmp_path, two_templates):
    """Through conversion, healing and export; `test_publish` has them on the Hub."""
    options = {"num_expert_sublayers": 1, "num_experts_per_sublayer": 4, "progress": False}
    convert_checkpoint(two_templates, tmp_path / "there", **options)
    heal(tmp_path / "there", tmp_path / "healed", teacher=str(two_templates), **{**QUICK, "steps": 1})
    export_checkpoint(tmp_path / "there", tmp_path / "back", progress=False)
    expected = with_tools(two_templates)
    assert expected.startswith("TOOLS")
    for name in ("there", "healed", "back"):
        assert (tmp_path / name / MORE).read_text() == TOOLS
        assert with_tools(tmp_path / name) == expected


LOAD = """
import builtins, os
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
asked = []
builtins.input = lambda question: asked.append(question) or "n"
from transformers import AutoTokenizer
how = json.loads(sys.argv[2])
answer = {"ids": AutoTokenizer.from_pretrained(sys.argv[1], **how)("Hello there")["input_ids"], "asked": asked}
"""
# What transformers 4 and 5 make of a class that is not named, or that only transformers 5 knows, differs.
CLASSES = {"a class that transformers 4 does not know": "TokenizersBackend", "no class": None}
# Without a class transformers 4 takes a Llama's, whose rules are not those of these files.
KNOWN_EVERYWHERE = ["PreTrainedTokenizerFast", *["LlamaTokenizerFast"] * transformers.__version__.startswith("4.")]


@pytest.mark.parametrize("case", CLASSES)
def test_the_tokenizer_asks_for_no_code(tmp_path, dense, case):
    """Without the argument transformers 5 asks before it reads any file of the tokenizer's; 4 goes by the class."""
    shutil.copytree(dense, tmp_path / "dense")
    path = tmp_path / "dense/tokenizer_config.json"
    content = {**json.loads(path.read_text()), "tokenizer_class": CLASSES[case]}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    convert_checkpoint(tmp_path / "dense", tmp_path / "out", num_expert_sublayers=1, progress=False)
    written = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert written["tokenizer_class"] in KNOWN_EVERYWHERE
    plain_is_silent = transformers.__version__.startswith("4.")
    its_own_class = plain_is_silent and CLASSES[case] is None
    as_dense = AutoTokenizer.from_pretrained(tmp_path / "dense" if its_own_class else dense)
    expected = as_dense("Hello there")["input_ids"]
    for how in ({"trust_remote_code": False}, *([{}] if plain_is_silent else [])):
        assert run_isolated(LOAD, tmp_path / "out", json.dumps(how)) == {"ids": expected, "asked": []}


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """As many fine-tuned Llamas are: a token was added to the tokenizer and has no embedding."""
    folder = make_dense(tmp_path_factory.mktemp("padded") / "dense", vocab_size=259)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    return folder


def test_a_tokenizer_larger_than_the_vocabulary_is_told_of(tmp_path, padded):
    with pytest.warns(
        UserWarning, match=r"has 259 tokens, and its tokenizer 1 beyond those, such as '\[PAD\]' \(259\)"
    ):
        convert_checkpoint(padded, tmp_path / "out", num_expert_sublayers=1, progress=False)


def asked(folder, name, *lines):
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_tokens_outside_of_the_embeddings_are_one_line_in_eval(tmp_path, capsys, padded):
    texts = [{"question": f"There was a {words}", "answer": "girl"} for words in ("big cat", "very very little dog")]
    asked(tmp_path, "q.jsonl", *texts)
    command = ["eval", str(padded), "--local", str(tmp_path), "--device", "cpu", "--quiet"]
    assert main([*command, "--batch-size", "2"]) == 2
    assert "fills batches (--batch-size 1 has nothing to fill) up with '[PAD]', token 259" in capsys.readouterr().err
    assert main([*command, "--batch-size", "1"]) == 0
    asked(tmp_path, "q.jsonl", {"context": "There was a [PAD]", "word": "girl"})
    assert main(command) == 2
    assert "the tokenizer gives a token that the model does not have" in capsys.readouterr().err


def test_a_bos_outside_of_the_embeddings_is_one_line(tmp_path, dense):
    """`--calibrate self` and `finedeep heal` sample texts that begin with it."""
    shutil.copytree(dense, tmp_path / "dense")
    path = tmp_path / "dense/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bos_token_id": 260}))
    words = "bos_token_id=260, and the model has 260 tokens, from 0"
    options = {"num_expert_sublayers": 2, "num_experts_per_sublayer": 4, "progress": False}
    with pytest.raises(ConversionError, match=words):
        convert_checkpoint(tmp_path / "dense", tmp_path / "cut", calibrate="self", **options)
    convert_checkpoint(tmp_path / "dense", tmp_path / "cut", **options)
    with pytest.raises(ConversionError, match=words):
        heal(tmp_path / "cut", tmp_path / "healed", teacher=str(tmp_path / "dense"), **QUICK)
    assert {folder.name for folder in tmp_path.iterdir()} == {"dense", "cut"}
