# SPDX-License-Identifier: Apache-2.0
"""A small fine-grained MoE of random weights, for shapes with many experts.

The architecture is OLMoE's (Muennighoff et al. 2024, arXiv:2409.02060): 64 experts,
top-8, weights not renormalised. It has no skills; its routing differs from token to
token and changes the output.
"""

import math
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader
from safetensors.torch import save_file

from moe_tta.lab.dense import field
from moe_tta.lab.differences import to_bf16
from moe_tta.lab.tokenizer import write_json, write_tokenizer

SEED = 20_260_101
HIDDEN = 256
LAYERS = 8
HEADS = 4
EXPERTS = 64
TOP_K = 8
INTERMEDIATE = 128

# Gains over 1/sqrt(fan_in), which keeps unit variance. So router logits have a standard
# deviation of one and output logits of three. Eight of 64 experts hold 0.42 of the
# softmax; the down gain lifts an FFN's output to 0.6 (root mean square, measured)
# beside a residual stream that grows from 1.0 to 2.4.
GAINS = {"down_proj": 6.0, "lm_head": 3.0}


def fine_config(reader: GGUFReader) -> dict:
    """The config.json of the model, with the vocabulary of the GGUF file."""
    return {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "norm_topk_prob": False,
        "max_position_embeddings": 4096,
        "vocab_size": len(field(reader, "tokenizer.ggml.tokens")),
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": field(reader, "tokenizer.ggml.padding_token_id"),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "clip_qkv": None,
        "tie_word_embeddings": False,
        "use_cache": True,
        "dtype": "bfloat16",
    }


def shapes(vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape, under OlmoeForCausalLM's checkpoint names."""
    found = {
        "model.embed_tokens.weight": (vocab_size, HIDDEN),
        "lm_head.weight": (vocab_size, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    norms = ("input_layernorm", "post_attention_layernorm")
    norms += ("self_attn.q_norm", "self_attn.k_norm")
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        found |= {f"{prefix}.{norm}.weight": (HIDDEN,) for norm in norms}
        for name in "qkvo":
            found[f"{prefix}.self_attn.{name}_proj.weight"] = (HIDDEN, HIDDEN)
        found[f"{prefix}.mlp.gate.weight"] = (EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            block = f"{prefix}.mlp.experts.{expert}"
            found[f"{block}.gate_proj.weight"] = (INTERMEDIATE, HIDDEN)
            found[f"{block}.up_proj.weight"] = (INTERMEDIATE, HIDDEN)
            found[f"{block}.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
    return found


def uniform(bits: np.random.Philox, shape: tuple[int, ...], std: float) -> np.ndarray:
    """Draws float32 weights, uniform about zero, with standard deviation `std`.

    The raw bits of Philox are part of its definition (Salmon et al. 2011), while
    numpy may change how it draws from a distribution; so weights are made from bits.
    """
    count = math.prod(shape)
    raw = bits.random_raw(-(-count // 4)).astype("<u8").view("<i2")[:count]
    scale = np.float32(std * math.sqrt(3) / 2**15)
    return (raw.astype(np.float32) * scale).reshape(shape)


def fine_tensors(vocab_size: int) -> dict[str, torch.Tensor]:
    """Every tensor of the model in bfloat16; norms are one, embeddings unit size."""
    bits, tensors = np.random.Philox(key=SEED), {}
    for name, shape in shapes(vocab_size).items():
        if len(shape) == 1:
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
            continue
        gain = next((g for part, g in GAINS.items() if part in name), 1.0)
        std = 1.0 if "embed" in name else gain / math.sqrt(shape[1])
        tensors[name] = to_bf16(uniform(bits, shape, std))
    return tensors


def write_fine(gguf: Path, out: Path) -> None:
    """Writes the model as an OlmoeForCausalLM checkpoint.

    Args:
        gguf: the dense model, whose tokenizer the model takes.
        out: an existing folder.
    """
    reader = GGUFReader(gguf)
    config = fine_config(reader)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", ids)
    write_tokenizer(reader, out)
    tensors = fine_tensors(config["vocab_size"])
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
