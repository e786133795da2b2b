"""The models that are served: a dense Llama, its conversions, every option and every family. Heads are of 32."""

import functools
import json

import torch
from conftest import TINY, byte_tokenizer
from finedeep import FinedeepConfig, FinedeepForCausalLM
from finedeep.convert import convert_checkpoint
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

SIZES = {**TINY, "hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 512}
K = 4
SCALES = {"embedding_multiplier": 6.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2, "logits_scaling": 4.0}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}

# name -> (how it is cut, whether its routers are random instead of zeros, which give every expert the weight 1)
CONVERTED = {
    "M=1, zero routers": ({"num_expert_sublayers": 1}, False),
    "grow, zero routers": ({"num_expert_sublayers": 2, "mode": "grow"}, False),
    "M=1": ({"num_expert_sublayers": 1}, True),
    "M=2": ({"num_expert_sublayers": 2}, True),
    "grow": ({"num_expert_sublayers": 2, "mode": "grow"}, True),
}
OPTIONS = {
    "softmax": {"routing_function": "softmax"},
    "hidden state": {"routing_input": "hidden_state"},
    "hidden state, softmax": {"routing_input": "hidden_state", "routing_function": "softmax"},
    "sandwich": {"sublayer_output_norm": True},
    "biases": {"mlp_bias": True, "attention_bias": True},
    "biases, softmax": {"mlp_bias": True, "routing_function": "softmax", "sublayer_output_norm": True},
    "another activation": {"hidden_act": "relu2"},  # which vLLM has no merged kernel for
}
FAMILIES = {
    "llama": {"rope_scaling": {"rope_type": "llama3", "factor": 4.0, **LLAMA3}},
    "mistral": {"sliding_window": 16},
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 64},
    "smollm3": {"no_rope_layer_interval": 2},
    "phi3": {"sliding_window": 16},
    "granite": SCALES,
    "seed_oss": {"head_dim": 32, "attention_dropout": 0.0, "residual_dropout": 0.0},
}
ADAPTERS = {
    "q, v": ["q_proj", "v_proj"],
    "gate, up": ["gate_proj", "up_proj"],
    "down": ["down_proj"],
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def randomise(model, deviation=0.08):
    """Weights with which tokens have different probabilities, and the best one is far from the second."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(mean=float("norm" in name), std=deviation, generator=generator)
    return model


def save(model, folder):
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def set_routers(folder, deviation=1.0):
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, weight in weights.items():
        if name.endswith(".router"):
            weight.normal_(std=deviation, generator=generator)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def dense_of(family, folder, changes=None):
    """A family's own model, with random weights, in `folder`."""
    config = CONFIG_MAPPING[family](**{**SIZES, **(FAMILIES[family] if changes is None else changes)})
    save(randomise(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)), folder)
    return folder


class Models:
    """Folders by name, each made when it is first asked for."""

    def __init__(self, root):
        self.root = root
        self.folder = functools.cache(self.folder)
        self.adapter = functools.cache(self.adapter)
        self.quantised = functools.cache(self.quantised)

    def folder(self, name):
        out = self.root / name.replace(" ", "-").replace(",", "")
        if name == "dense":
            dense_of("llama", out, {})
        elif name in CONVERTED:
            cut, routers = CONVERTED[name]
            convert_checkpoint(self.folder("dense"), out, num_experts_per_sublayer=K, progress=False, **cut)
            if routers:
                set_routers(out)
        elif name in FAMILIES:
            source = dense_of(name, self.root / f"{name}-dense")
            convert_checkpoint(source, out, num_expert_sublayers=2, num_experts_per_sublayer=K, progress=False)
            set_routers(out)
        else:
            config = FinedeepConfig(**SIZES, num_experts_per_sublayer=K, **OPTIONS[name])
            save(randomise(FinedeepForCausalLM(config)), out)
            set_routers(out)
        return out

    def adapter(self, name, adapter):
        """A LoRA adapter of rank 4 with random values, made and saved by PEFT."""
        model = AutoModelForCausalLM.from_pretrained(self.folder(name))
        config = LoraConfig(r=4, lora_alpha=12, target_modules=ADAPTERS[adapter], task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
        generator = torch.Generator().manual_seed(len(adapter))
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                parameter.data.normal_(std=0.1, generator=generator)
        out = self.root / f"{self.folder(name).name}-adapter-{adapter.replace(', ', '-')}"
        model.save_pretrained(out)
        return out

    def quantised(self, name):
        """The model with int8 weights (a scale for each row) and int8 activations (a scale for each token)."""
        source, out = self.folder(name), self.root / f"{self.folder(name).name}-int8"
        out.mkdir()
        for file in source.iterdir():
            if file.is_file():
                (out / file.name).write_bytes(file.read_bytes())
        weights = {}
        for tensor_name, weight in load_file(source / "model.safetensors").items():
            if tensor_name.endswith("_proj.weight"):
                scale = weight.abs().amax(-1, keepdim=True) / 127
                weights[f"{tensor_name}_scale"] = scale
                weight = (weight / scale).round().to(torch.int8)
            weights[tensor_name] = weight
        save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((out / "config.json").read_text())
        int8 = {"num_bits": 8, "type": "int", "symmetric": True}
        group = {
            "targets": ["Linear"],
            "weights": {**int8, "strategy": "channel", "dynamic": False},
            "input_activations": {**int8, "strategy": "token", "dynamic": True},
        }
        config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": group},
        }
        (out / "config.json").write_text(json.dumps(config))
        return out
