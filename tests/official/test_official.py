"""transformers' own model tests, for Llama and for Finedeep side by side: the very same tests from one class.

`fetch.py` gets them; without it, everything here is skipped. `compare.py` runs them and sets the models' results
against each other.
"""

import importlib
import sys
import types
import unittest
from contextlib import suppress
from unittest import mock

import finedeep
import pytest
import transformers
from transformers.models.auto import modeling_auto

from .fetch import FOLDER

if not FOLDER.is_dir():
    pytest.skip(f"no official tests at {FOLDER}; `python tests/official/fetch.py` gets them", allow_module_level=True)
pytest.importorskip("parameterized", reason="the official tests need it: pip install parameterized")

pytestmark = pytest.mark.slow

# What the official tests import and their archive lacks. An empty mixin adds no test. The keyword arguments are those
# with which ConfigTester makes a config to see whether they arrive.
ABSENT = {
    "tests.generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "tests.exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "tests.utils.test_configuration_utils": {
        "config_common_kwargs": {"return_dict": False, "output_hidden_states": True, "dtype": "float16"},
    },
}


def official(name):
    """The module `tests.<name>` of the archive."""
    if "tests" not in sys.modules:
        # By hand, since this project's own folder of tests would answer to the same name.
        sys.modules["tests"] = types.ModuleType("tests")
        sys.modules["tests"].__path__ = [str(FOLDER / "tests")]
        for path, contents in ABSENT.items():
            for part in (path.rpartition(".")[0], path):
                module = sys.modules.setdefault(part, types.ModuleType(part))
                module.__path__ = []
            vars(module).update(contents)
    return importlib.import_module(f"tests.{name}")


common = official("test_modeling_common")
ConfigTester = official("test_configuration_common").ConfigTester
MIXINS = [common.ModelTesterMixin]
# Since 5.0. Of the others, the pipelines' needs models from the Hub, tensor parallelism's and FSDP's several processes.
with suppress(ModuleNotFoundError):
    MIXINS.append(official("test_training_mixin").TrainingTesterMixin)

# A head's name, and the table in which transformers lists the classes that have it. Official tests look there to learn
# which labels a class takes.
HEADS = {
    "Model": modeling_auto.MODEL_MAPPING_NAMES,
    "ForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "ForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "ForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "ForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}

TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_expert_sublayers": 2, "num_experts_per_sublayer": 4}


class ModelTester:
    """What the official tests ask for: a small config, inputs that fit it, and its sizes as attributes."""

    batch_size = 13
    seq_length = 7
    is_training = True

    def __init__(self, classes, fields):
        self.config_class = classes["Config"]
        self.base_model_class = classes["Model"]
        self.causal_lm_class = classes["ForCausalLM"]
        self.sequence_classification_class = classes["ForSequenceClassification"]
        self.fields = fields
        vars(self).update(TINY)

    def get_config(self):
        return self.config_class(**self.fields)

    def prepare_config_and_inputs_for_common(self):
        input_ids = common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": input_ids, "attention_mask": input_ids.ne(0).long()}


class OfficialTests(*MIXINS):
    """All official tests of a model. A subclass says whose: where its classes are, how they begin, what they take."""

    package, prefix, extra_fields = transformers, "", {}
    model_tester = None
    test_pruning = test_head_masking = False  # of attention heads, which no decoder offers
    test_generation_tester_mixin_inheritance = None  # asks for the tests of generation, which the archive lacks

    def setUp(self):
        classes = {end: getattr(self.package, self.prefix + end) for end in ("Config", *HEADS)}
        self.model_tester = ModelTester(classes, TINY | self.extra_fields)
        self.all_model_classes = tuple(classes[head] for head in HEADS)
        self.config_tester = ConfigTester(self, config_class=classes["Config"], **self.model_tester.fields)
        for head, table in HEADS.items():
            listed = mock.patch.dict(table, {classes["Config"].model_type: classes[head].__name__})
            listed.start()
            self.addCleanup(listed.stop)
        # Some tests read warnings, which this project's tests do without.
        self.addCleanup(transformers.logging.set_verbosity, transformers.logging.get_verbosity())
        transformers.logging.set_verbosity_warning()
        # Inputs come from this generator and weights from torch's: the same for every model, and in every run.
        common.global_rng.seed(0)
        transformers.set_seed(0)
        super().setUp()

    def test_config(self):
        self.config_tester.run_common_tests()


class TestLlama(OfficialTests, unittest.TestCase):
    package, prefix, extra_fields = transformers, "Llama", {}


class TestFinedeep(OfficialTests, unittest.TestCase):
    package, prefix, extra_fields = finedeep, "Finedeep", EXPERTS


class TestFinedeepWithOutputNorm(OfficialTests, unittest.TestCase):
    package, prefix, extra_fields = finedeep, "Finedeep", {**EXPERTS, "sublayer_output_norm": True}
