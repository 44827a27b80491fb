# SPDX-License-Identifier: Apache-2.0
"""Int8 low-rank expert differences: exact on every machine.

Expert ``e`` of layer ``n`` is the dense matrix plus ``scale * (left @ right)``
(LoRA, Hu et al. 2021, arXiv:2106.09685, one adapter per expert of an upcycled
model, Komatsuzaki et al. 2022, arXiv:2212.05055). Either factor may be shared by
the experts of a layer; its expert axis then has length one.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from moe_tta.lab.errors import LabError

MATRICES = ("gate", "up", "down")
INT8_MAX = 127
# A float32 holds every integer up to 2**24, so sums below it do not depend on order.
EXACT_LIMIT = 2**24


def quantise(left: torch.Tensor, right: torch.Tensor) -> dict[str, torch.Tensor]:
    """Rounds two float factors to int8 with one scale per layer and expert.

    Args:
        left: [layers, experts or 1, out_features, rank].
        right: [layers, experts or 1, rank, in_features].

    Returns:
        ``left`` and ``right`` as int8 of the same shapes and ``scale``, float32
        [layers, experts].
    """
    parts, scale = {}, torch.ones(())
    for name, factor in (("left", left.float()), ("right", right.float())):
        step = factor.abs().amax(dim=(2, 3), keepdim=True).clamp(min=1e-12) / INT8_MAX
        parts[name] = (factor / step).round().to(torch.int8).contiguous()
        scale = scale * step[:, :, 0, 0]
    parts["scale"] = scale.contiguous()
    return parts


def difference(left: np.ndarray, right: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Multiplies out int8 factors, bit for bit the same on every machine.

    The product of the integers is exact in float32 in any order of summation, so
    the one rounding is the elementwise product with the scale.

    Args:
        left: int8 [experts or 1, out_features, rank].
        right: int8 [experts or 1, rank, in_features].
        scale: float32 [experts].

    Returns:
        float32 [experts, out_features, in_features].

    Raises:
        LabError: the rank is too large for an exact product.
    """
    if left.shape[-1] * 128 * 128 > EXACT_LIMIT:
        raise LabError(f"rank {left.shape[-1]} is too large for an exact product")
    product = np.matmul(left.astype(np.float32), right.astype(np.float32))
    return product * scale.astype(np.float32)[:, None, None]


def to_bf16(weight: np.ndarray) -> torch.Tensor:
    """Rounds float32 to bfloat16, to nearest with ties to even."""
    return torch.from_numpy(np.ascontiguousarray(weight, np.float32)).bfloat16()


def expert_weights(
    dense: np.ndarray, left: np.ndarray, right: np.ndarray, scale: np.ndarray
) -> torch.Tensor:
    """Adds each expert's difference to the dense matrix.

    Args:
        dense: float32 [out_features, in_features].
        left: as in `difference`.
        right: as in `difference`.
        scale: as in `difference`.

    Returns:
        bfloat16 [experts, out_features, in_features].
    """
    return to_bf16(dense[None] + difference(left, right, scale))


def save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes differences: ``{gate,up,down}.{left,right,scale}`` and ``router``.

    Args:
        path: the safetensors file.
        tensors: factors as `quantise` returns them, and ``router``, bfloat16
            [layers, experts, hidden_size].
    """
    save_file(tensors, path, metadata={"format": "pt"})


def load(path: Path) -> dict[str, torch.Tensor]:
    """Reads what `save` wrote.

    Raises:
        LabError: a tensor is missing.
    """
    tensors = load_file(path)
    parts = [f"{m}.{p}" for m in MATRICES for p in ("left", "right", "scale")]
    missing = sorted({"router", *parts} - set(tensors))
    if missing:
        raise LabError(f"{path} lacks the tensors {', '.join(missing)}")
    return tensors
