"""Which dense families can be converted: a table of what maps to what, and of what cannot and why.

A family's tensors are named as Llama's are, but for projections that it stores fused. Fields of Llama's configuration
keep their values; the table says where a family differs. To add a family, add an entry, and its smallest config to
`tests/convert/test_families.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finedeep_files.errors import ConversionError

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


@dataclass(frozen=True)
class Family:
    """How one `model_type` of transformers reads as a Finedeep configuration and as Llama's tensors."""

    models: str  # who they are, for messages
    reads: tuple[str, ...] = ()  # fields beyond Llama's that its models go by; of others, a config may carry anything
    always: Mapping[str, Any] = field(default_factory=dict)  # Finedeep field -> its value in this family
    renamed: Mapping[str, str] = field(default_factory=dict)  # Finedeep field -> the family's field
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # stored module -> Llama's modules, row by row


WINDOWS = ("sliding_window", "layer_types")
MULTIPLIERS = ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling")
NO_MLP_BIAS = {"mlp_bias": False}
NO_BIAS = {"attention_bias": False, "mlp_bias": False}
FAMILIES: dict[str, Family] = {
    "llama": Family("Llama 1 to 3.x, TinyLlama, SmolLM, Yi and the like"),
    "mistral": Family("Mistral", reads=("sliding_window",), always=NO_BIAS),
    "qwen2": Family(
        "Qwen2, Qwen2.5", reads=WINDOWS, always={"attention_bias": True, "attention_output_bias": False, **NO_MLP_BIAS}
    ),
    "qwen3": Family("Qwen3", reads=WINDOWS, always={"qk_norm": True, **NO_MLP_BIAS}),
    "smollm3": Family("SmolLM3", reads=(*WINDOWS, "no_rope_layers")),
    "phi3": Family(
        "Phi-3",
        reads=("sliding_window",),
        always=NO_BIAS,
        fused={"self_attn.qkv_proj": QKV, "mlp.gate_up_proj": GATE_UP},
    ),
    "granite": Family("Granite", reads=MULTIPLIERS),
    "seed_oss": Family("Seed-OSS", renamed={"attention_output_bias": "attention_out_bias"}),
}

# Families that users will try, and why they cannot be converted.
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        ("gemma", "gemma2", "gemma3", "gemma3_text"),
        "its norms multiply by 1 + weight, in other precision than Llama's, and Gemma 2 and 3 normalise what the FFN "
        "puts out",
    ),
    **dict.fromkeys(
        ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "olmoe", "granitemoe", "gpt_oss", "dbrx"),
        "it is a mixture of experts already; a dense FFN is what is cut",
    ),
    **dict.fromkeys(
        ("bert", "roberta", "modernbert", "deberta-v2"), "it is an encoder, and only decoders can be converted"
    ),
    **dict.fromkeys(("t5", "bart", "whisper"), "it has an encoder and a decoder, and only decoders can be converted"),
    **dict.fromkeys(
        ("gpt2", "gpt_neox", "opt", "phi", "starcoder2", "arcee"),
        "its FFN has no gate, and only SwiGLU can be converted",
    ),
    **dict.fromkeys(("olmo2", "olmo3", "exaone4"), "it normalises what the FFN puts out, not what goes in"),
}


def why_not(config: Mapping[str, Any]) -> str:
    """Why a config of no known family cannot be converted, as a part of a sentence."""
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in REFUSED:
        return REFUSED[model_type]
    if any(isinstance(config.get(name), int) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return "its config has experts; a dense FFN is what is cut"
    return "this family is not known here"


def check_family(config: Mapping[str, Any], where: str) -> None:
    """Raise `ConversionError` for a config of no family that can be converted."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConversionError(
            f"{where} has model_type {model_type!r}, which cannot be converted: {why_not(config)}. Families that can: "
            f"{', '.join(FAMILIES)}."
        )
