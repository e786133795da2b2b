"""Checkpoints that are no causal language model as it should be, told apart by the names of their tensors."""

from collections.abc import Iterable

from finedeep_files.errors import ConversionError

from .source import DenseCheckpoint

BASE = "model."
# The last part of a name before ".weight" or ".bias" -> what kind of model has it.
HEADS = {
    "score": "a classifier or a reward model",
    "classifier": "a classifier",
    "qa_outputs": "a model for question answering",
    "v_head": "a policy with a value head",
    "value_head": "a policy with a value head",
}


def check_kind(dense: DenseCheckpoint, wanted: Iterable[str]) -> None:
    """Raise `ConversionError` for a base model without its prefix, and for a model with another head.

    Args:
        dense: the checkpoint.
        wanted: the names of a causal language model's tensors.
    """
    wanted, found = set(wanted), set(dense.tensors)
    for name in sorted(found - wanted):
        parts = set(name.split(".")[:-1])
        if kind := next((HEADS[part] for part in HEADS if part in parts), None):
            raise ConversionError(
                f"{dense.folder} holds {name}: it is {kind}. A causal language model can be converted; take the one "
                "that this was made from."
            )
    without = found & {name.removeprefix(BASE) for name in wanted if name.startswith(BASE)}
    if without and not any(name.startswith(BASE) for name in found):
        raise ConversionError(
            f"{dense.folder} holds tensors without the prefix {BASE!r} ({min(without)}): it was saved from the base "
            "model alone, without its head. Load it with AutoModelForCausalLM in transformers and save it again; where "
            "embeddings are not tied, lm_head.weight has to come from the full checkpoint."
        )
