"""Run by torchrun: DeepSpeed's ZeRO-3, every parameter in parts, gives the loss and gradients of one process.

Arguments: the model's folder; the modules that DeepSpeed gathers as a whole: none, or the name of their class.
"""

import sys

import deepspeed
import torch
from agreement import agree, gradients
from deepspeed.utils import safe_get_full_grad, set_z3_leaf_modules
from transformers import AutoModelForCausalLM

folder, leaf = sys.argv[1:]
whole = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
if leaf != "none":
    set_z3_leaf_modules(model, [type(module) for module in model.modules() if type(module).__name__ == leaf][:1])
settings = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
ids = torch.arange(2 * 50).reshape(2, 50) % whole.config.vocab_size
for tokens in (ids, ids[:1, :3]):
    with torch.no_grad():
        agree("logits", engine(tokens).logits, whole(tokens).logits)
    expected = gradients(whole, tokens)
    engine.backward(engine(tokens, labels=tokens, use_cache=False).loss)
    for name, parameter in engine.module.named_parameters():
        agree(name, safe_get_full_grad(parameter), expected[name])
    engine.step()  # with a learning rate of 0: it lets go of the gradients
torch.distributed.destroy_process_group()
