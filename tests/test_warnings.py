"""What is deprecated and this project's code does is an error in its tests; what other people's code does is not."""

import warnings

import pytest
import torch
from isolated import run_isolated

OURS = ("finedeep.modeling_finedeep", "transformers_modules.org.modeling_finedeep", "finedeep_cli.eval_command")


@pytest.mark.parametrize("kind", [FutureWarning, DeprecationWarning, PendingDeprecationWarning])
@pytest.mark.parametrize("module", OURS)
def test_a_deprecation_that_our_code_causes_is_an_error(module, kind):
    with pytest.raises(kind):
        warnings.warn_explicit("old", kind, "file.py", 1, module=module)


def test_a_deprecation_that_others_cause_is_not():
    with warnings.catch_warnings(record=True):
        warnings.warn_explicit("old", DeprecationWarning, "file.py", 1, module="trl.trainer")


class Renamed(torch.nn.Module):
    def forward(self, new=None, old=None):
        if old is not None:
            warnings.warn("`old` is called `new`", FutureWarning, stacklevel=2)


def test_an_arguments_old_name_is_an_error_in_a_call_of_a_module():
    """As transformers warns of it: by the frame that called `forward`, which is torch's."""
    with pytest.raises(FutureWarning, match="is called `new`"):
        Renamed()(old=1)


SCRIPT = """
answer = []
for module in ("transformers_modules.org.modeling_finedeep", "torch.nn.modules.module", "somebody.else"):
    try:
        warnings.warn_explicit("old", FutureWarning, "file.py", 1, module=module)
    except FutureWarning:
        answer.append(module)
"""


def test_so_it_is_in_a_process_that_has_the_folders_code_alone():
    assert run_isolated(SCRIPT) == ["transformers_modules.org.modeling_finedeep", "torch.nn.modules.module"]
