"""The layer written from the equations of the design, in plain loops: slow, obvious, sharing no code with the model."""

import torch


def rms_norm(x, weight, eps):
    return weight * x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps)


def silu(x):
    return x / (1 + torch.exp(-x))


def sublayer(h, p, config):
    """h (tokens, hidden) -> what is added to the residual stream; p: the sub-layer's parameters by name."""
    experts, hidden = p["router"].shape
    n = rms_norm(h, p["norm.weight"], config.rms_norm_eps)
    rows = p["gate_proj.weight"].shape[0] // experts
    out = []
    for t in range(h.shape[0]):
        outputs, scores = [], []
        for k in range(experts):
            mine = slice(k * rows, (k + 1) * rows)
            gate = p["gate_proj.weight"][mine] @ n[t]
            up = p["up_proj.weight"][mine] @ n[t]
            if config.mlp_bias:
                gate = gate + p["gate_proj.bias"][mine]
                up = up + p["up_proj.bias"][mine]
            E_k = p["down_proj.weight"][:, mine] @ (silu(gate) * up)
            if config.mlp_bias:
                E_k = E_k + p["expert_bias"][k]
            read = E_k if config.routing_input == "expert_output" else n[t]
            outputs.append(E_k)
            scores.append((p["router"][k] * read).sum())
        total = torch.zeros(hidden, dtype=h.dtype)
        for k in range(experts):
            if config.routing_function == "sigmoid":
                g_k = 1 / (1 + torch.exp(-scores[k]))
            else:
                g_k = torch.exp(scores[k]) / sum(torch.exp(s) for s in scores)
            total = total + config.routed_scaling_factor * g_k * outputs[k]
        out.append(total)
    out = torch.stack(out)
    if config.sublayer_output_norm:
        out = rms_norm(out, p["output_norm.weight"], config.rms_norm_eps)
    return out


def ffn(h, parameters, config):
    """h (tokens, hidden) through the M sub-layers of one decoder layer, residuals included."""
    for m in range(config.num_expert_sublayers):
        mine = {name.removeprefix(f"{m}."): p for name, p in parameters.items() if name.startswith(f"{m}.")}
        h = h + sublayer(h, mine, config)
    return h


def rotate(x, position, theta):
    """Rotary embedding (Su et al., 2021) of one head vector, halves paired as in Llama's Hugging Face form."""
    half = x.shape[0] // 2
    out = []
    for j in range(half):
        angle = torch.tensor(position / theta ** (2 * j / x.shape[0]), dtype=x.dtype)
        out.append(x[j] * torch.cos(angle) - x[half + j] * torch.sin(angle))
    for j in range(half):
        angle = torch.tensor(position / theta ** (2 * j / x.shape[0]), dtype=x.dtype)
        out.append(x[half + j] * torch.cos(angle) + x[j] * torch.sin(angle))
    return torch.stack(out)


def attention(x, p, config, theta):
    """Causal grouped-query attention over x (tokens, hidden)."""
    D, H, KV = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    project = {}
    for name in "qkv":
        y = x @ p[f"{name}_proj.weight"].T
        project[name] = y + p[f"{name}_proj.bias"] if config.attention_bias else y
    out = []
    for t in range(x.shape[0]):
        heads = []
        for head in range(H):
            shared = head // (H // KV)
            q = rotate(project["q"][t, head * D : (head + 1) * D], t, theta)
            scores, values = [], []
            for s in range(t + 1):
                k = rotate(project["k"][s, shared * D : (shared + 1) * D], s, theta)
                scores.append((q * k).sum() / D**0.5)
                values.append(project["v"][s, shared * D : (shared + 1) * D])
            weights = torch.stack([torch.exp(s) for s in scores])
            weights = weights / weights.sum()
            heads.append(sum(w * v for w, v in zip(weights, values, strict=True)))
        out.append(torch.cat(heads))
    y = torch.stack(out) @ p["o_proj.weight"].T
    return y + p["o_proj.bias"] if config.attention_bias else y


def logits(ids, state, config, theta):
    """ids: a list of token ids -> (tokens, vocab), for a causal LM's whole state dict."""

    def under(prefix):
        return {name.removeprefix(prefix): p for name, p in state.items() if name.startswith(prefix)}

    h = state["model.embed_tokens.weight"][ids]
    for i in range(config.num_hidden_layers):
        layer = under(f"model.layers.{i}.")
        normed = rms_norm(h, layer["input_layernorm.weight"], config.rms_norm_eps)
        h = h + attention(normed, under(f"model.layers.{i}.self_attn."), config, theta)
        h = ffn(h, under(f"model.layers.{i}.sublayers."), config)
    h = rms_norm(h, state["model.norm.weight"], config.rms_norm_eps)
    return h @ state["lm_head.weight"].T
