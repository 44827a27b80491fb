# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's tensors; on CPU views of its files, read by the page when used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from moe_tta.adapter.errors import AdapterError
from moe_tta.adapter.experts import MappedExperts
from moe_tta.adapter.families import Family


def map_checkpoint(folder: Path, device: torch.device) -> dict[str, torch.Tensor]:
    """Map every tensor of a checkpoint folder into memory.

    Args:
        folder: Holds one or more `*.safetensors` files.
        device: Where to; files can be mapped on the CPU only, elsewhere they are read.

    Returns:
        Tensors by the checkpoint's names; on the CPU views of memory-mapped files.

    Raises:
        AdapterError: there is no such file, or a tensor is not floating point.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise AdapterError(f"{folder} holds no *.safetensors file to map")
    tensors = {}
    for file in files:
        with safe_open(file, framework="pt", device=str(device)) as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise AdapterError(f"{name} is {tensor.dtype}: quantised weights")
    return tensors


def take_experts(
    model: nn.Module, tensors: dict[str, torch.Tensor], family: Family
) -> None:
    """Replace each MoE block's experts by views, taking them out of `tensors`.

    Args:
        model: A transformers causal language model on the meta device.
        tensors: By the checkpoint's names; loses the experts.
        family: Of the model.

    Raises:
        AdapterError: an expert's matrix is missing or has another shape.
    """
    for number, layer in enumerate(model.model.layers):
        experts = getattr(layer.mlp, "experts", None)
        if experts is None:
            continue
        prefix = f"model.layers.{number}.{family.block}.experts"
        inner, hidden = experts.intermediate_dim, experts.hidden_dim
        sides = {
            family.gate: (inner, hidden),
            family.up: (inner, hidden),
            family.down: (hidden, inner),
        }
        parts = [
            [
                _take(tensors, f"{prefix}.{expert}.{matrix}.weight", shape)
                for expert in range(experts.num_experts)
            ]
            for matrix, shape in sides.items()
        ]
        layer.mlp.experts = MappedExperts(*parts, experts.act_fn)


def model_names(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], family: Family
) -> dict[str, torch.Tensor]:
    """Return what is left of the checkpoint under transformers' names.

    Raises:
        AdapterError: a tensor is missing or has another shape.
    """
    found, left = {}, dict(tensors)
    for name, wanted in model.state_dict().items():
        if not wanted.numel():
            continue  # a shared expert without units, which no checkpoint stores
        theirs = name.replace(".mlp.gate.", f".{family.block}.gate.")
        if name == "lm_head.weight" and theirs not in left and _tied(model.config):
            theirs = "model.embed_tokens.weight"
            found[name] = check_shape(theirs, tensors[theirs], tuple(wanted.shape))
            continue
        found[name] = _take(left, theirs, tuple(wanted.shape))
    return found


def _tied(config: Any) -> bool:
    return bool(config.tie_word_embeddings)


def _take(
    tensors: dict[str, torch.Tensor], name: str, shape: tuple[int, ...]
) -> torch.Tensor:
    if name not in tensors:
        raise AdapterError(f"the checkpoint holds no tensor {name}")
    return check_shape(name, tensors.pop(name), shape)


def check_shape(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...]
) -> torch.Tensor:
    """Return the tensor if it has the shape.

    Raises:
        AdapterError: it has another.
    """
    if tuple(tensor.shape) != shape:
        raise AdapterError(
            f"{name} has shape {tuple(tensor.shape)}, expected {shape}: the adapter "
            "needs whole tensors, so one GPU and no padding"
        )
    return tensor
