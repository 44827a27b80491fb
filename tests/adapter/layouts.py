# SPDX-License-Identifier: Apache-2.0
"""Tensors of a checkpoint as vLLM 0.32 holds them on a GPU: names, order, padding."""

import torch
from safetensors.torch import load_file
from transformers import AutoConfig

MATRICES = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "olmoe": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "qwen2_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
}


def fuse(state, names, name):
    """Put tensors below one another, where the model has them."""
    if names[0] in state:
        state[name] = torch.cat([state.pop(part) for part in names])


def vllm_tensors(path, vocab_padding=64):
    """Return (config, tensors) with fused qkv and stacked experts."""
    config = AutoConfig.from_pretrained(path)
    state = load_file(f"{path}/model.safetensors")
    block, gate, up, down = MATRICES[config.model_type]
    for number in range(config.num_hidden_layers):
        layer = f"model.layers.{number}"
        attention = f"{layer}.self_attn"
        for part in ("weight", "bias"):
            names = [f"{attention}.{side}_proj.{part}" for side in "qkv"]
            fuse(state, names, f"{attention}.qkv_proj.{part}")
        for ffn in (f"{layer}.mlp", f"{layer}.mlp.shared_expert"):
            names = [f"{ffn}.{side}_proj.weight" for side in ("gate", "up")]
            fuse(state, names, f"{ffn}.gate_up_proj.weight")
        experts = f"{layer}.{block}.experts"
        if f"{experts}.0.{gate}.weight" not in state:
            continue
        count = sum(f"{experts}.{n}.{gate}.weight" in state for n in range(999))
        w13, w2 = [], []
        for expert in range(count):
            sides = [state.pop(f"{experts}.{expert}.{s}.weight") for s in (gate, up)]
            w13.append(torch.cat(sides))
            w2.append(state.pop(f"{experts}.{expert}.{down}.weight"))
        state[f"{experts}.routed_experts.w13_weight"] = torch.stack(w13)
        state[f"{experts}.routed_experts.w2_weight"] = torch.stack(w2)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        extra = torch.zeros(vocab_padding, state[name].shape[1])
        state[name] = torch.cat([state[name], extra.to(state[name])])
    return config, state
