"""A Finedeep model in vLLM: its Transformers backend, with expert sub-layers that are made of vLLM's own layers.

Attention, caches, fusions, the mapping of weights and compilation are the backend's, and the model is built from the
folder's code. Without this class the backend serves the same folder, more slowly: to it `down_proj` is a layer like any
other, whose weight the model cannot read.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from vllm.model_executor.models.transformers import TransformersForCausalLM

from .vllm_sublayer import FinedeepSublayer


class FinedeepForCausalLM(TransformersForCausalLM):
    """The backend's causal language model, with `FinedeepSublayer` in place of the folder's sub-layers."""

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        """Build the model.

        Raises:
            ValueError: the engine's options do not fit this model. The message names the option and what works.
        """
        refuse_what_cannot_be_served(vllm_config)
        self.scores_are_read = False
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if self.pp_group.is_last_rank:  # of folders whose configuration does not say it in vLLM's way
            self.logits_processor.scale = 1 / self.text_config.logits_scaling

    def sublayers(self) -> Iterator[FinedeepSublayer]:
        """Those of this process."""
        return (module for module in self.model.modules() if isinstance(module, FinedeepSublayer))

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The backend's, whose call of the model runs no hooks; in a model of Granite's, one scales the embeddings."""
        scale = self.text_config.embedding_multiplier
        if scale != 1 and self.pp_group.is_first_rank:
            embeds = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
            input_ids, inputs_embeds = None, embeds * scale
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)

    def recursive_replace(self) -> None:
        """Swap the sub-layers; then the backend replaces the layers in them, as everywhere."""
        for i, layer in enumerate(self.model.layers):
            for m, theirs in enumerate(getattr(layer, "sublayers", ())):  # another stage's layer has none
                layer.sublayers[m] = FinedeepSublayer(theirs, self.quant_config, f"model.layers.{i}.sublayers.{m}")
        super().recursive_replace()
        for sublayer in self.sublayers():
            sublayer.refuse_projections_that_are_apart()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the checkpoint, once: vLLM tells nobody when weights that it loads again are in place.

        Raises:
            NotImplementedError: weights are to be loaded into a model that is being served.
        """
        if self.scores_are_read:
            raise NotImplementedError("Weights of a Finedeep model cannot be reloaded; start another engine.")
        return super().load_weights(weights)

    def process_weights_after_loading(self) -> None:
        """vLLM's hook after its own layers have packed or quantised their weights."""
        for sublayer in self.sublayers():
            sublayer.read_score_vectors()
        self.scores_are_read = True


def refuse_what_cannot_be_served(vllm_config: Any) -> None:
    """Raise `ValueError`, before anything is loaded."""
    config, lora = vllm_config.model_config.hf_config, vllm_config.lora_config
    processes, experts = vllm_config.parallel_config.tensor_parallel_size, config.num_experts_per_sublayer
    if experts % processes:
        raise ValueError(
            f"tensor_parallel_size={processes} cannot share out the {experts} experts of a sub-layer "
            f"(num_experts_per_sublayer); a divisor of {experts} works."
        )
    if lora is not None and lora.fully_sharded_loras:
        raise ValueError("fully_sharded_loras=True is not supported by Finedeep models; leave it out.")
