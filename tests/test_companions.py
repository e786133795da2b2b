"""What travels with the weights: every chat template, and a tokenizer that loads without running code."""

import json
import shutil

import pytest
import transformers
from finedeep.convert import convert_checkpoint, export_checkpoint
from finedeep.convert.healing import heal
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


@pytest.mark.parametrize("case", CLASSES)
def test_the_tokenizer_asks_for_no_code(tmp_path, dense, case):
    """Without the argument transformers 5 asks before it reads any file of the tokenizer's; 4 goes by the class."""
    shutil.copytree(dense, tmp_path / "dense")
    path = tmp_path / "dense/tokenizer_config.json"
    content = {**json.loads(path.read_text()), "tokenizer_class": CLASSES[case]}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    convert_checkpoint(tmp_path / "dense", tmp_path / "out", num_expert_sublayers=1, progress=False)
    written = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"  # every version knows it
    expected = AutoTokenizer.from_pretrained(dense)("Hello there")["input_ids"]
    plain_is_silent = transformers.__version__.startswith("4.")
    for how in ({"trust_remote_code": False}, *([{}] if plain_is_silent else [])):
        assert run_isolated(LOAD, tmp_path / "out", json.dumps(how)) == {"ids": expected, "asked": []}
