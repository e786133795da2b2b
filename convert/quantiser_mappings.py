"""Which layer's scale can be moved into which, as AWQ and SmoothQuant need to be told, in llm-compressor's notation.

A scale is taken from the channels of the first layer's output and given to the columns of the layers that read it. No
logit changes: an expert's score is read from its output, which stays as it is.

    from finedeep.convert.quantiser_mappings import mappings_of
    from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    SmoothQuantModifier(mappings=[(balanced, smoothed) for smoothed, balanced in mappings_of(config, norms_only=True)])
    AWQModifier(mappings=[AWQMapping(smoothed, balanced) for smoothed, balanced in mappings_of(config)])
"""

from ..configuration_finedeep import FinedeepConfig

INPUT = ("re:.*input_layernorm$", ["re:.*q_proj$", "re:.*k_proj$", "re:.*v_proj$"])
VALUES = ("re:.*v_proj$", ["re:.*o_proj$"])
SUBLAYER = (r"re:.*sublayers\.\d+\.norm$", [r"re:.*sublayers\.\d+\.gate_proj$", r"re:.*sublayers\.\d+\.up_proj$"])
EXPERTS = (r"re:.*sublayers\.\d+\.up_proj$", [r"re:.*sublayers\.\d+\.down_proj$"])


def mappings_of(config: FinedeepConfig, norms_only: bool = False) -> list[tuple[str, list[str]]]:
    """Pairs of a layer and the layers that read its output, as patterns of module names.

    Args:
        config: with scores read from the hidden state, the sub-layers' norms are left out, as routers read them too.
        norms_only: only those whose first layer is a norm, as SmoothQuant has them for Llama.
    """
    norms = [INPUT] + ([SUBLAYER] if config.routing_input == "expert_output" else [])
    return norms if norms_only else [*norms, VALUES, EXPERTS]
