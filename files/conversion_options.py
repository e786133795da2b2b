"""The options of a conversion, for `finedeep.convert` and for the command line, which must not import torch."""

from dataclasses import dataclass

from .options import option

MODES = {
    "split": "the dense neurons are shared by all sub-layers: the same size",
    "grow": "sub-layer 1 has the dense neurons, new ones start with a zero W_down: exact for any M, and larger",
}
# How scores become gates, in the words of a model card; `finedeep.configuration_finedeep` has the functions.
ROUTING_FUNCTIONS = {"sigmoid": "a sigmoid", "softmax": "a softmax over its sub-layer's experts"}
MEASURED = ("activity", "nonlinearity")  # assignments that need a text


def _shard_size() -> str:
    return option("5GB", "largest weight file (default: %(default)s)", metavar="SIZE")


@dataclass(frozen=True)
class ExportOptions:
    """How the dense model is written."""

    max_shard_size: str = _shard_size()


@dataclass(frozen=True)
class Options:
    """What the user asked for. The fields of the receipt's `options`, with which the same bytes can be made again."""

    num_expert_sublayers: int = option(
        1, "sub-layers per decoder layer (default: 1, which is exact)", flag="sublayers", metavar="M", least=1
    )
    num_experts_per_sublayer: int = option(
        8, "experts per sub-layer, all active (default: 8)", flag="experts", metavar="K", least=1
    )
    mode: str = option(
        "split",
        "split: sub-layers share the dense neurons, same size (default). grow: sub-layer 1 has them all and new ones "
        "start at zero; exact, larger",
        choices=tuple(MODES),
    )
    assignment: str | None = option(
        None,
        "which neuron goes to which expert: in their own order (contiguous, default), dealt out (strided), shuffled "
        "(random), the most active on a text first (activity), the least linear first (nonlinearity, default with "
        "--calibrate), by direction of their gates (clusters), or by a function of yours (package:function)",
        metavar="NAME",
    )
    text: str | None = option(
        None, "the text on which activity is measured, without --calibrate", flag="assignment-text", metavar="FILE"
    )
    calibrate: str | None = option(
        None,
        "fit each layer to the dense one on a text file, or on a text sampled from the dense model (self); there is "
        "nothing to fit where the conversion is exact",
        metavar="TEXT",
    )
    calibration_tokens: int | None = option(
        None,
        "of the text; a sixteenth is held out (default: by the model's size, at least 65,536)",
        metavar="N",
        least=1,
    )
    calibration_steps: int | None = option(
        None,
        "of 4,096 tokens, for each layer; 0: closed-form corrections only (default: 100)",
        metavar="N",
        least=0,
    )
    seed: int = option(0, "for random, clusters, new weights and calibration (default: 0)")
    routing_input: str = option(
        "expert_output",
        "what an expert's score is read from (default: expert_output, the paper's method)",
        choices=("expert_output", "hidden_state"),
    )
    routing_function: str = option("sigmoid", "how scores become gates (default: sigmoid)", choices=ROUTING_FUNCTIONS)
    dtype: str = option(
        "keep",
        "of the weights that are written (default: keep)",
        choices=("keep", "float32", "bfloat16", "float16"),
    )
    max_shard_size: str = _shard_size()

    def __post_init__(self) -> None:
        not_measured = self.calibrate is not None and self.exact and self.text is None
        if self.assignment is None or (self.assignment in MEASURED and not_measured):
            object.__setattr__(self, "assignment", "nonlinearity" if self.calibrates else "contiguous")

    @property
    def exact(self) -> bool:
        """Whether the logits will equal the dense model's whatever else is asked for."""
        return self.num_expert_sublayers == 1 or self.mode == "grow"

    @property
    def calibrates(self) -> bool:
        """Whether there is something to calibrate, and the user wants it."""
        return self.calibrate is not None and not self.exact
