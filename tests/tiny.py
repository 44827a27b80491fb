# SPDX-License-Identifier: Apache-2.0
"""Tiny random MoE models whose routing and text are far from uniform."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

COMMON = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
CONFIGS = {
    "mixtral": {
        "intermediate_size": 96,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "head_dim": 32,
    },
    "olmoe": {
        "intermediate_size": 32,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "num_key_value_heads": 4,
    },
    "qwen3_moe": {
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "head_dim": 32,
    },
    "qwen2_moe": {
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
        "num_experts": 12,
        "num_experts_per_tok": 4,
        "norm_topk_prob": False,
        "mlp_only_layers": [1],
    },
}


def build(name, folder):
    """Save the named tiny model and return its folder."""
    config = AutoConfig.for_model(name, **{**COMMON, **CONFIGS[name]})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(torch.float32)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.dim() > 1:
                scale = 2.0 if "gate.weight" in key else 1.0
                weight.normal_(0, scale / weight.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    return folder
