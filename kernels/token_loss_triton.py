# SPDX-License-Identifier: Apache-2.0
"""The loss of `token_loss.py` as a Triton kernel: one launch, one program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_tta.kernels.launch import Launcher

_BLOCK = 4096  # logits at a time
# what a maximum starts from, so that no logit less it is infinity less infinity
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


def score_rows(
    logits: torch.Tensor, targets: torch.Tensor, nll: torch.Tensor, slopes: bool
) -> None:
    """Do what `token_loss.score_rows` does, in float32.

    Args:
        logits: [N, V], the last dimension contiguous.
        targets: [N] int64, contiguous.
        nll: [N] float32, contiguous.
        slopes: Whether `logits` are overwritten by the derivative.
    """
    num_rows, vocab = logits.shape
    if num_rows == 0:
        return
    kind = vocab, logits.stride(0), slopes, logits.dtype
    _launch((num_rows, 1, 1), (logits, targets, nll), (), kind)


def _constants(vocab: int, stride: int, slopes: bool, *_: object) -> dict:
    return {
        "V": vocab,
        "STRIDE": stride,
        "SLOPES": slopes,
        "BLOCK": min(_BLOCK, triton.next_power_of_2(vocab)),
        "num_warps": 8,
        "enable_fp_fusion": True,
    }


@triton.jit
def _add_block(most, total, logits):
    """Add exp(logits) to each lane's sum, which is in units of exp(its maximum)."""
    above = tl.maximum(most, logits)
    total = total * tl.exp(most - above) + tl.exp(logits - above)
    return above, total


@triton.jit
def _write_slopes(row_ptr, columns, inside, target, most, inverse):
    logits = tl.load(row_ptr + columns, mask=inside).to(tl.float32)
    slopes = tl.exp(logits - most) * inverse - tl.where(columns == target, 1.0, 0.0)
    tl.store(row_ptr + columns, slopes.to(row_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _score_rows(
    logits_ptr,
    targets_ptr,
    nll_ptr,
    V: tl.constexpr,
    STRIDE: tl.constexpr,
    SLOPES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * STRIDE
    target = tl.load(targets_ptr + row)
    wanted = tl.load(logits_ptr + target).to(tl.float32)
    lanes = tl.arange(0, BLOCK)
    tail = V // BLOCK * BLOCK + lanes
    in_tail = tail < V
    most = tl.full([BLOCK], _LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V // BLOCK * BLOCK, BLOCK):
        logits = tl.load(logits_ptr + start + lanes).to(tl.float32)
        most, total = _add_block(most, total, logits)
    if V % BLOCK:
        logits = tl.load(logits_ptr + tail, mask=in_tail, other=float("-inf"))
        most, total = _add_block(most, total, logits.to(tl.float32))
    highest = tl.max(most, axis=0)
    total = tl.sum(total * tl.exp(most - highest), axis=0)
    # the two differences apart: the sum of a large maximum and a logarithm would round
    tl.store(nll_ptr + row, tl.log(total) + (highest - wanted))
    if SLOPES:
        inverse = 1.0 / total
        for start in range(0, V // BLOCK * BLOCK, BLOCK):
            columns = start + lanes
            _write_slopes(logits_ptr, columns, None, target, highest, inverse)
        if V % BLOCK:
            _write_slopes(logits_ptr, tail, in_tail, target, highest, inverse)


_launch = Launcher(_score_rows, _constants)
