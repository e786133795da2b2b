"""The files that travel meet next year's transformers: they name what they use, and hand the rest on by keyword."""

import ast

import pytest
import torch
from conftest import random_model
from finedeep.configuration_finedeep import AUTO_MAP
from finedeep.convert.code_files import CODE_FILES
from transformers import Trainer, TrainingArguments
from transformers.dynamic_module_utils import get_relative_imports

IDS = torch.arange(6)[None]


@pytest.mark.parametrize("file", CODE_FILES, ids=lambda file: file.name)
def test_no_inherited_forward_is_called_with_positional_arguments(file):
    """5.24 renamed an argument of `forward`: whoever had handed it on by position handed on two."""
    calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    forwards = [call for call in calls if ast.unparse(call.func).endswith(".forward")]
    inherited = [call for call in forwards if not ast.unparse(call.func).startswith("kernel.")]
    assert not [ast.unparse(call) for call in inherited if call.args]


@pytest.mark.parametrize("reference", sorted({name.split(".")[0] for name in AUTO_MAP.values()}))
def test_a_file_with_classes_imports_all_files_that_it_needs(reference):
    """transformers up to 5.0 copies of a local folder what the class's own file imports, and not what that imports."""
    file = next(file for file in CODE_FILES if file.stem == reference)
    direct = set(get_relative_imports(file))
    needed, found = set(), {reference}
    while found - needed:
        needed |= found
        found = {name for file in CODE_FILES if file.stem in needed for name in get_relative_imports(file)}
    assert needed - {reference} == direct


def test_an_argument_that_nobody_knows_yet_arrives_at_the_attention():
    model, seen = random_model(), []
    for layer in model.model.layers:
        hook = lambda module, args, kwargs: seen.append(kwargs.get("of_next_year"))  # noqa: E731
        layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True)
    model(IDS, of_next_year="here")
    assert seen == ["here"] * model.config.num_hidden_layers


def test_a_field_that_nobody_knows_yet_comes_out_of_the_head(monkeypatch):
    model = random_model()
    original = model.model.forward

    def forward(*args, **kwargs):
        output = original(*args, **kwargs)
        output["of_next_year"] = torch.ones(1)
        return output

    monkeypatch.setattr(model.model, "forward", forward)
    output = model(IDS)
    assert output["of_next_year"].item() == 1
    assert "last_hidden_state" not in output


def test_trainer_takes_no_column_away(tmp_path):
    """`Trainer` drops the columns of a dataset that a `forward` does not name."""
    datasets = pytest.importorskip("datasets")
    names = ["input_ids", "attention_mask", "position_ids", "labels"]
    data = datasets.Dataset.from_dict({name: IDS.tolist() for name in names})
    trainer = Trainer(random_model(), TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
    assert trainer._remove_unused_columns(data).column_names == names


def test_generate_refuses_no_argument_that_llama_takes():
    given = {"attention_mask": torch.ones_like(IDS), "position_ids": torch.arange(6)[None], "logits_to_keep": 1}
    model = random_model()
    assert model.generate(IDS, max_new_tokens=2, do_sample=False, **given).shape == (1, 8)
    with pytest.raises(ValueError, match="of_next_yaer"):
        model.generate(IDS, max_new_tokens=2, of_next_yaer=1)
