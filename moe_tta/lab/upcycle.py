# SPDX-License-Identifier: Apache-2.0
"""Writes the dense model, and its upcycle into a Mixtral, as checkpoint folders."""

from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader
from safetensors.torch import save_file
from tqdm import tqdm

from moe_tta.lab import differences
from moe_tta.lab.dense import base_config, dense_tensors
from moe_tta.lab.tokenizer import write_json, write_tokenizer

WEIGHTS = "model.safetensors"
TOP_K = 2
# Mixtral's names of the three matrices of an expert.
MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2"}


def mixtral_config(base: dict, num_experts: int, top_k: int) -> dict:
    """The config.json of a `base` model upcycled to a MixtralForCausalLM."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **base,
        "num_local_experts": num_experts,
        "num_experts_per_tok": top_k,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
    }


def layer_experts(
    dense: dict[str, np.ndarray], factors: dict[str, torch.Tensor], layer: int
) -> dict[str, torch.Tensor]:
    """The router and experts of one layer, under Mixtral's checkpoint names.

    Args:
        dense: float32 tensors under LlamaForCausalLM's names.
        factors: as `differences.load` returns them.
        layer: its index.
    """
    block = f"model.layers.{layer}.block_sparse_moe"
    tensors = {f"{block}.gate.weight": factors["router"][layer].contiguous()}
    for matrix, short in MIXTRAL.items():
        parts = (factors[f"{matrix}.{p}"][layer] for p in ("left", "right", "scale"))
        weights = differences.expert_weights(
            dense[f"model.layers.{layer}.mlp.{matrix}_proj.weight"],
            *(part.numpy() for part in parts),
        )
        for expert, weight in enumerate(weights):
            # A copy, since safetensors refuses tensors that share their memory.
            name = f"{block}.experts.{expert}.{short}.weight"
            tensors[name] = weight.clone()
    return tensors


def upcycle(
    dense: dict[str, np.ndarray],
    factors: dict[str, torch.Tensor],
    progress: bool = False,
) -> dict[str, torch.Tensor]:
    """Turns a dense Llama and its expert differences into a Mixtral checkpoint.

    Args:
        dense: float32 tensors under LlamaForCausalLM's names.
        factors: as `differences.load` returns them.
        progress: shows a bar on stderr.

    Returns:
        bfloat16 tensors under MixtralForCausalLM's names.
    """
    tensors = {
        name: differences.to_bf16(weight)
        for name, weight in dense.items()
        if ".mlp." not in name
    }
    layers = range(factors["router"].shape[0])
    for layer in tqdm(layers, "building experts", disable=not progress, unit="layer"):
        tensors.update(layer_experts(dense, factors, layer))
    return tensors


def _write(
    reader: GGUFReader, out: Path, config: dict, tensors: dict[str, torch.Tensor]
) -> None:
    write_json(out / "config.json", config)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(out / "generation_config.json", ids)
    write_tokenizer(reader, out)
    # One metadata key alone: the order of several is not fixed.
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})


def write_dense(gguf: Path, out: Path) -> None:
    """Writes the dense model as a LlamaForCausalLM checkpoint in bfloat16."""
    reader = GGUFReader(gguf)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    dense = dense_tensors(reader)
    tensors = {name: differences.to_bf16(weight) for name, weight in dense.items()}
    _write(reader, out, config | base_config(reader), tensors)


def write_moe(
    gguf: Path, factors_file: Path, out: Path, progress: bool = False
) -> None:
    """Writes the upcycled model as a MixtralForCausalLM checkpoint in bfloat16.

    Args:
        gguf: the dense model.
        factors_file: differences and routers, as `differences.save` writes them.
        out: an existing folder.
        progress: shows a bar on stderr.
    """
    reader = GGUFReader(gguf)
    factors = differences.load(factors_file)
    config = mixtral_config(base_config(reader), factors["router"].shape[1], TOP_K)
    _write(reader, out, config, upcycle(dense_tensors(reader), factors, progress))
