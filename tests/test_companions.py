"""What travels with the weights: every chat template, and a tokenizer that loads without running code."""

import shutil

import pytest
from finedeep.convert import convert_checkpoint, export_checkpoint
from finedeep.convert.healing import heal
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
