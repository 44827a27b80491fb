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
DEEPSEEK = {
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    # MLA's kernels know kv_lora_rank + qk_rope_head_dim = 576 only, and on GPUs those
    # of prefill few others than the published 128, 64 and 128
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
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
    # an MoE in every layer, as the adapter's independent reference wants it
    "qwen2_moe_whole": {
        "model_type": "qwen2_moe",
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
        "num_experts": 12,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
    },
    "deepseek_v2": {
        **DEEPSEEK,
        "n_shared_experts": 2,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "group_limited_greedy",
        "norm_topk_prob": False,
        "routed_scaling_factor": 2.0,
    },
    "deepseek_v2_lite": {
        **DEEPSEEK,
        "model_type": "deepseek_v2",
        "n_shared_experts": 2,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    },
    "deepseek_v3": {
        **DEEPSEEK,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 0,
    },
    "glm4_moe": {
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        "first_k_dense_replace": 2,
        "num_nextn_predict_layers": 0,
        "head_dim": 32,
    },
    "gpt_oss": {
        "intermediate_size": 96,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "head_dim": 32,
        "sliding_window": 32,
    },
    "granitemoe": {
        "intermediate_size": 64,
        "num_local_experts": 10,
        "num_experts_per_tok": 3,
        "attention_multiplier": 0.2,
        "logits_scaling": 2.0,
    },
    "phimoe": {
        "architectures": ["PhiMoEForCausalLM"],
        "intermediate_size": 96,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
}


GATES = ("gate.weight", "router.weight")
# weights that steer routing: by name, the standard deviation they are drawn with
SPREAD = {"router.bias": 0.5, "e_score_correction_bias": 0.1}


def build(name, folder):
    """Save the named tiny model and return its folder."""
    fields = {**COMMON, **CONFIGS[name]}
    config = AutoConfig.for_model(fields.pop("model_type", name), **fields)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(torch.float32)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.dim() > 1:
                scale = 2.0 if key.endswith(GATES) else 1.0
                weight.normal_(0, scale / weight.shape[-1] ** 0.5)
        for key, weight in model.state_dict().items():
            for ending, spread in SPREAD.items():
                if key.endswith(ending):
                    weight.normal_(0, spread)
    model.save_pretrained(folder)
    return folder
