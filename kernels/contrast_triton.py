# SPDX-License-Identifier: Apache-2.0
"""The contrast of `contrast.py` as one Triton kernel, in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_tta.kernels.contrast import IMPLAUSIBLE

BLOCK_SIZE = 4096  # tokens of the vocabulary at a time

_IMPLAUSIBLE = tl.constexpr(IMPLAUSIBLE)
_INF = tl.constexpr(float("inf"))


def contrast_rows(
    logits: torch.Tensor,
    leads: torch.Tensor,
    followers: torch.Tensor,
    beta: torch.Tensor,
    alpha: torch.Tensor,
) -> None:
    """Overwrite the leads' rows by `contrast_logits(lead, follower, beta, alpha)`.

    Source: SCMoE, arXiv 2405.14507; see `contrast.contrast_logits` for the rule.

    Args:
        logits: [N, V] float32, tokens next to each other in memory.
        leads: [P] int64 rows of the strong logits; no row twice.
        followers: [P] int64 rows of the weak logits; no lead among them.
        beta: [P] float32, >= 0.
        alpha: [P] float32 in [0, 1].

    Raises:
        ValueError: dtypes, shapes or strides differ from these.
    """
    num_pairs = leads.shape[0]
    _check(logits, leads, followers, beta, alpha)
    if num_pairs == 0:
        return
    _contrast_kernel[(num_pairs,)](
        logits,
        leads,
        followers,
        beta,
        alpha.log(),
        logits.shape[1],
        logits.stride(0),
        BLOCK_SIZE=BLOCK_SIZE,
        num_warps=16,
    )


def _check(logits: torch.Tensor, *given: torch.Tensor) -> None:
    if logits.dtype != torch.float32 or logits.dim() != 2 or logits.stride(1) != 1:
        raise ValueError(
            f"expected float32 logits [N, V] with stride 1 along V, got {logits.dtype} "
            f"{tuple(logits.shape)} with strides {logits.stride()}"
        )
    dtypes = (torch.int64, torch.int64, torch.float32, torch.float32)
    for tensor, dtype in zip(given, dtypes, strict=True):
        if tensor.dtype != dtype or tensor.shape != given[0].shape or tensor.dim() != 1:
            raise ValueError(
                f"expected {dtype} [{len(given[0])}], got {tensor.dtype} "
                f"{tuple(tensor.shape)}"
            )


@triton.jit
def _load_strong(row_ptr, offsets, mask):
    strong = tl.load(row_ptr + offsets, mask=mask, other=-_INF)
    return tl.where(strong == strong, strong, -_INF)


@triton.jit
def _contrast_kernel(
    logits_ptr,  # [N, V] float32
    leads_ptr,  # [P] int64
    followers_ptr,  # [P] int64
    beta_ptr,  # [P] float32
    log_alpha_ptr,  # [P] float32
    vocab_size,
    logits_stride,
    BLOCK_SIZE: tl.constexpr,
):
    pair = tl.program_id(0)
    strong_ptr = logits_ptr + tl.load(leads_ptr + pair) * logits_stride
    weak_ptr = logits_ptr + tl.load(followers_ptr + pair) * logits_stride
    beta = tl.load(beta_ptr + pair)
    lanes = tl.arange(0, BLOCK_SIZE)

    best = tl.full((BLOCK_SIZE,), -_INF, tl.float32)
    for start in range(0, vocab_size, BLOCK_SIZE):
        offsets = start + lanes
        strong = _load_strong(strong_ptr, offsets, offsets < vocab_size)
        best = tl.maximum(best, strong)
    cut = tl.max(best, axis=0) + tl.load(log_alpha_ptr + pair)

    # the strong row is still in the cache
    for start in range(0, vocab_size, BLOCK_SIZE):
        offsets = start + lanes
        mask = offsets < vocab_size
        strong = _load_strong(strong_ptr, offsets, mask)
        difference = strong - tl.load(weak_ptr + offsets, mask=mask, other=0.0)
        finite = tl.abs(difference) < _INF  # false for NaN too
        contrasted = strong + beta * tl.where(finite, difference, 0.0)
        result = tl.where(strong < cut, strong - _IMPLAUSIBLE, contrasted)
        tl.store(strong_ptr + offsets, result, mask=mask)
