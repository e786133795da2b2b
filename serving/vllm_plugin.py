"""What vLLM calls when it starts, by the entry point group `vllm.general_plugins`."""


def register() -> None:
    """Name the class that serves Finedeep models. vLLM imports it once such a model is to be served."""
    from vllm import ModelRegistry

    ModelRegistry.register_model("FinedeepForCausalLM", "finedeep_serving.vllm_model:FinedeepForCausalLM")
