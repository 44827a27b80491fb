# SPDX-License-Identifier: Apache-2.0
"""Differences of a model that was not trained yet: every expert is the dense FFN."""

import math

import numpy as np
import torch

from moe_tta.lab.differences import MATRICES, to_bf16
from moe_tta.lab.fine import uniform

SEED = 20_261_123


def neutral_factors(config: dict, num_experts: int) -> dict[str, torch.Tensor]:
    """Zero differences of rank one, and routers with logits of about unit size.

    Args:
        config: of the dense model, as `dense.base_config` returns it.
        num_experts: in every layer.

    Returns:
        Tensors as `differences.load` returns them.
    """
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    inner = config["intermediate_size"]
    shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    bits = np.random.Philox(key=SEED)
    router = uniform(bits, (layers, num_experts, hidden), 1 / math.sqrt(hidden))
    tensors = {"router": to_bf16(router)}
    for matrix in MATRICES:
        out, into = shapes[matrix]
        left = torch.zeros(layers, num_experts, out, 1, dtype=torch.int8)
        right = torch.zeros(layers, num_experts, 1, into, dtype=torch.int8)
        tensors[f"{matrix}.left"], tensors[f"{matrix}.right"] = left, right
        tensors[f"{matrix}.scale"] = torch.zeros(layers, num_experts)
    return tensors
