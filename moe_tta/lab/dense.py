# SPDX-License-Identifier: Apache-2.0
"""Dequantises a dense model's GGUF file into the tensors and config of transformers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from dataclasses import field as attribute

import numpy as np
from gguf import GGUFReader, dequantize

from moe_tta.lab.errors import LabError

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


@dataclass(frozen=True)
class DenseFamily:
    """What distinguishes the dense models of one GGUF architecture.

    All have tied embeddings.

    Attributes:
        architecture: The class of transformers.
        model_type: Its name in config.json.
        embedding: GGUF tensor that becomes the embedding; where a file holds the tied
            matrix twice, the more precise one.
        dropped: GGUF tensors that are left out.
        interleaved: Whether rows of q and k are paired for the rotary embedding.
        attention: Entries of config.json on the attention.
        ends: GGUF names of the tokens that end a generation.
    """

    architecture: str
    model_type: str
    embedding: str = "token_embd.weight"
    dropped: tuple[str, ...] = ()
    interleaved: bool = False
    attention: dict = attribute(default_factory=dict)
    ends: tuple[str, ...] = ("eos",)


FAMILIES = {  # by general.architecture
    "llama": DenseFamily(
        "LlamaForCausalLM",
        "llama",
        interleaved=True,
        attention={"attention_bias": False},
    ),
    # Q4_K_M keeps the tied matrix as Q8_0 for the output and as Q5_0 for the input
    "qwen2": DenseFamily(
        "Qwen2ForCausalLM",
        "qwen2",
        embedding="output.weight",
        dropped=("token_embd.weight",),
        attention={"use_sliding_window": False},
        ends=("eos", "padding"),
    ),
}


def family_of(reader: GGUFReader) -> DenseFamily:
    """The family of a file.

    Raises:
        LabError: the lab knows none of its architecture.
    """
    name = field(reader, "general.architecture")
    if name not in FAMILIES:
        raise LabError(f"expected one of {', '.join(FAMILIES)}, the file holds {name}")
    return FAMILIES[name]


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


def model_field(reader: GGUFReader, key: str):
    """The value of a metadata key that is named after the architecture."""
    return field(reader, f"{field(reader, 'general.architecture')}.{key}")


def hf_name(name: str, family: DenseFamily) -> str:
    """Translates a GGUF tensor name into the name transformers uses."""
    names = {
        family.embedding: "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }
    if name in names:
        return names[name]
    _, layer, kind, part = name.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[kind]}.{part}"


class DenseTensors(Mapping):
    """A file's tensors as float32 under transformers' names, dequantised when read.

    The output embedding is absent: it is tied to ``model.embed_tokens.weight``.
    """

    def __init__(self, reader: GGUFReader):
        self.family = family_of(reader)
        self._stored = {
            hf_name(tensor.name, self.family): tensor
            for tensor in reader.tensors
            if tensor.name not in self.family.dropped
        }
        self._heads = {}
        if self.family.interleaved:
            self._heads = {
                "attn_q": model_field(reader, "attention.head_count"),
                "attn_k": model_field(reader, "attention.head_count_kv"),
            }

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._stored[name]
        weight = np.array(dequantize(tensor.data, tensor.tensor_type))  # off the file
        heads = self._heads.get(tensor.name.split(".")[-2])
        return unpermute(weight, heads) if heads else weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def token_ids(reader: GGUFReader) -> dict:
    """The entries of config.json that name special tokens."""
    return {
        f"{short}_token_id": field(reader, f"tokenizer.ggml.{name}_token_id")
        for short, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }


def generation_config(reader: GGUFReader) -> dict:
    """The content of generation_config.json: special tokens, and what ends a text."""
    ends = [
        field(reader, f"tokenizer.ggml.{name}_token_id")
        for name in family_of(reader).ends
    ]
    return token_ids(reader) | {"eos_token_id": ends if len(ends) > 1 else ends[0]}


def base_config(reader: GGUFReader) -> dict:
    """The entries of config.json that the dense model and its upcycle share."""
    theta = float(model_field(reader, "rope.freq_base"))
    eps = float(model_field(reader, "attention.layer_norm_rms_epsilon"))
    hidden = model_field(reader, "embedding_length")
    heads = model_field(reader, "attention.head_count")
    return {
        "hidden_size": hidden,
        "intermediate_size": model_field(reader, "feed_forward_length"),
        "num_hidden_layers": model_field(reader, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": model_field(reader, "attention.head_count_kv"),
        "head_dim": hidden // heads,
        "max_position_embeddings": model_field(reader, "context_length"),
        "vocab_size": len(field(reader, "tokenizer.ggml.tokens")),
        "rms_norm_eps": float(f"{eps:.6g}"),  # stored as float32
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        **token_ids(reader),
        "hidden_act": "silu",
        **family_of(reader).attention,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "use_cache": True,
        "dtype": "bfloat16",
    }
