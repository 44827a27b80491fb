# SPDX-License-Identifier: Apache-2.0
"""Dequantises SmolLM2's GGUF file into the tensors and config of a Llama."""

import numpy as np
from gguf import GGUFReader, dequantize

GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def unpermute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Undoes the rotary interleaving that GGUF applies to llama q and k weights.

    GGUF stores the pairs (i, i + head_dim / 2) side by side; see ``permute`` in
    llama.cpp's convert_hf_to_gguf.py.

    Args:
        weight: [num_heads * head_dim, hidden_size].
        num_heads: of the queries, or of the keys.
    """
    half = weight.shape[0] // num_heads // 2
    paired = weight.reshape(num_heads, half, 2, *weight.shape[1:])
    return np.ascontiguousarray(paired.swapaxes(1, 2).reshape(weight.shape))


def field(reader: GGUFReader, key: str):
    """The value of a GGUF metadata key."""
    return reader.fields[key].contents()


def hf_name(name: str) -> str:
    """Translates a GGUF tensor name into the name transformers uses."""
    if name in GLOBAL_NAMES:
        return GLOBAL_NAMES[name]
    _, layer, kind, _ = name.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[kind]}.weight"


def dense_tensors(reader: GGUFReader) -> dict[str, np.ndarray]:
    """Dequantises every tensor to float32, under LlamaForCausalLM's names.

    The output embedding is absent: it is tied to ``model.embed_tokens.weight``.
    """
    heads = {
        "attn_q": field(reader, "llama.attention.head_count"),
        "attn_k": field(reader, "llama.attention.head_count_kv"),
    }
    tensors = {}
    for tensor in reader.tensors:
        weight = np.array(dequantize(tensor.data, tensor.tensor_type))  # off the file
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            weight = unpermute(weight, heads[kind])
        tensors[hf_name(tensor.name)] = weight
    return tensors


def base_config(reader: GGUFReader) -> dict:
    """The entries of config.json that the dense model and its upcycle share."""
    theta = float(field(reader, "llama.rope.freq_base"))
    eps = float(field(reader, "llama.attention.layer_norm_rms_epsilon"))
    return {
        "hidden_size": field(reader, "llama.embedding_length"),
        "intermediate_size": field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": field(reader, "llama.block_count"),
        "num_attention_heads": field(reader, "llama.attention.head_count"),
        "num_key_value_heads": field(reader, "llama.attention.head_count_kv"),
        "head_dim": field(reader, "llama.rope.dimension_count"),
        "max_position_embeddings": field(reader, "llama.context_length"),
        "vocab_size": field(reader, "llama.vocab_size"),
        "rms_norm_eps": float(f"{eps:.6g}"),  # stored as float32
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "bos_token_id": field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": field(reader, "tokenizer.ggml.padding_token_id"),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "use_cache": True,
        "dtype": "bfloat16",
    }
