# SPDX-License-Identifier: Apache-2.0
"""The contrast of `contrast.py` as Triton kernels, for the rows of a whole batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_tta.kernels import launch
from moe_tta.kernels.contrast import IMPLAUSIBLE
from moe_tta.kernels.launch import Launcher

CHUNK = 4096  # tokens of the vocabulary per program
OVERLAPPED_CHUNK = 2048  # where the second launch begins before the first ends

_IMPLAUSIBLE = tl.constexpr(IMPLAUSIBLE)
_INF = tl.constexpr(float("inf"))
_OPTIONS = {
    "num_warps": 4,
    "enable_fp_fusion": False,  # round where `contrast_logits` rounds
}


class ContrastRows:
    """Overwrites rows of strong logits by their contrast; no sync.

    Two launches: the best logit of each chunk, then the combination. The second
    begins with the pairs that the first read last, whose strong rows are still in the
    L2 cache. Results equal `contrast.contrast_logits` bit for bit.

    Overlapped (CUDA's programmatic dependent launch), the second launch loads both
    rows while the first still runs, and waits for it to end before it reads the best
    logits or writes. What wrote the logits has ended by then: the first launch is an
    ordinary one, which starts after all that precedes it in its stream.

    Source: SCMoE, arXiv 2405.14507, equations 4 and 5; see `contrast_logits`.

    Args:
        max_pairs: The most pairs of a call.
        vocab_size: V, of every call.
        device: Where the logits are.
        overlap: Whether the launches overlap; by default where they can.

    Raises:
        ValueError: they shall overlap and cannot.
    """

    def __init__(
        self,
        max_pairs: int,
        vocab_size: int,
        device: torch.device | str,
        overlap: bool | None = None,
    ):
        able = can_overlap(torch.device(device))
        if overlap and not able:
            raise ValueError(
                "overlapping launches need compiled kernels and a GPU of compute "
                "capability 9.0 or above"
            )
        self.vocab_size = vocab_size
        self.overlap = able if overlap is None else overlap
        chunk = OVERLAPPED_CHUNK if self.overlap else CHUNK
        chunks = triton.cdiv(vocab_size, chunk)
        self._best = torch.empty(max_pairs, chunks, device=device)
        both = _OPTIONS | {"CHUNK": chunk, "OVERLAP": self.overlap}
        second = {"CHUNKS": triton.next_power_of_2(chunks), "launch_pdl": self.overlap}
        self._find_best = Launcher(_best_kernel, lambda *_: both)
        self._combine = Launcher(_combine_kernel, lambda *_: both | second)

    def __call__(
        self,
        logits: torch.Tensor,
        out: torch.Tensor,
        leads: torch.Tensor,
        followers: torch.Tensor,
        beta: torch.Tensor,
        alpha: torch.Tensor,
    ) -> None:
        """Write the contrast of P pairs; arguments are not checked, `check` does.

        Args:
            logits: [N, V] float32, bfloat16 or float16, stride 1 along V.
            out: [N, V] float32, stride 1 along V; may be `logits` itself.
            leads: [P] int64 rows of the strong logits, overwritten in `out`; none
                twice.
            followers: [P] int64 rows of the weak logits; no lead among them.
            beta: [P] float32, >= 0.
            alpha: [P] float32 in [0, 1].
        """
        num_pairs = leads.shape[0]
        if num_pairs == 0:
            return
        grid = num_pairs, self._best.shape[1], 1
        sizes = self.vocab_size, logits.stride(0), out.stride(0)
        kind = logits.dtype, *sizes
        self._find_best(grid, (logits, leads, self._best), sizes[:2], kind)
        self._combine(
            grid,
            (logits, out, leads, followers, beta, alpha, self._best),
            *(sizes, kind),
        )

    def check(
        self, logits: torch.Tensor, out: torch.Tensor, *given: torch.Tensor
    ) -> None:
        """Check what `__call__` takes.

        Raises:
            ValueError: dtypes, shapes or strides differ from what it names.
        """
        for name, tensor in (("logits", logits), ("out", out)):
            if tensor.shape != (len(logits), self.vocab_size) or tensor.stride(1) != 1:
                raise ValueError(
                    f"expected {name} [N, {self.vocab_size}] with stride 1 along V, "
                    f"got {tuple(tensor.shape)} with strides {tensor.stride()}"
                )
        if not logits.is_floating_point() or out.dtype != torch.float32:
            raise ValueError(
                f"expected float logits and float32 out, got {logits.dtype} and "
                f"{out.dtype}"
            )
        max_pairs = self._best.shape[0]
        dtypes = (torch.int64, torch.int64, torch.float32, torch.float32)
        for tensor, dtype in zip(given, dtypes, strict=True):
            right = tensor.dim() == 1 and tensor.is_contiguous()
            right = (
                right and tensor.shape == given[0].shape and len(tensor) <= max_pairs
            )
            if tensor.dtype != dtype or not right:
                raise ValueError(
                    f"expected contiguous {dtype} [{len(given[0])}], at most "
                    f"[{max_pairs}], got {tensor.dtype} {tuple(tensor.shape)}"
                )


def can_overlap(device: torch.device) -> bool:
    """Return whether the second launch may begin early; see `launch.can_overlap`."""
    return launch.can_overlap(_combine_kernel, device)


# name in `contrast.COMBINE` -> f(max_pairs, vocab_size, device), its kernels
COMBINE_ROWS: dict[str, Callable[..., ContrastRows]] = {"contrast": ContrastRows}


@triton.jit
def _load_strong(row_ptr, tokens, mask):
    strong = tl.load(row_ptr + tokens, mask=mask, other=-_INF).to(tl.float32)
    return tl.where(strong == strong, strong, -_INF)


@triton.jit
def _best_kernel(
    logits_ptr,  # [N, V]
    leads_ptr,  # [P] int64
    best_ptr,  # [P, chunks] float32
    vocab_size,
    logits_stride,
    CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        gdc_launch_dependents()
    pair, chunk = tl.program_id(0), tl.program_id(1)
    row_ptr = logits_ptr + tl.load(leads_ptr + pair) * logits_stride
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    strong = _load_strong(row_ptr, tokens, tokens < vocab_size)
    best = tl.max(strong, axis=0)
    tl.store(best_ptr + pair * tl.num_programs(1) + chunk, best)


@triton.jit
def _combine_kernel(
    logits_ptr,  # [N, V]
    out_ptr,  # [N, V] float32
    leads_ptr,  # [P] int64
    followers_ptr,  # [P] int64
    beta_ptr,  # [P] float32
    alpha_ptr,  # [P] float32
    best_ptr,  # [P, chunks] float32
    vocab_size,
    logits_stride,
    out_stride,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    pair = tl.num_programs(0) - 1 - tl.program_id(0)
    chunk, chunks = tl.program_id(1), tl.num_programs(1)
    lead = tl.load(leads_ptr + pair)
    weak_ptr = logits_ptr + tl.load(followers_ptr + pair) * logits_stride
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    mask = tokens < vocab_size
    strong = _load_strong(logits_ptr + lead * logits_stride, tokens, mask)
    # read and written once: the strong rows keep their place in the cache
    weak = tl.load(
        weak_ptr + tokens, mask=mask, other=0.0, eviction_policy="evict_first"
    )
    beta = tl.load(beta_ptr + pair)
    log_alpha = tl.log(tl.load(alpha_ptr + pair).to(tl.float64)).to(tl.float32)
    if OVERLAP:
        gdc_wait()  # above: what the first launch does not write; below: the rest
    every = tl.arange(0, CHUNKS)
    best = tl.load(best_ptr + pair * chunks + every, mask=every < chunks, other=-_INF)
    cut = tl.max(best, axis=0) + log_alpha

    difference = strong - weak.to(tl.float32)
    finite = tl.abs(difference) < _INF  # false for NaN too
    contrasted = strong + beta * tl.where(finite, difference, 0.0)
    result = tl.where(strong < cut, strong - _IMPLAUSIBLE, contrasted)
    out_row_ptr = out_ptr + lead * out_stride
    tl.store(out_row_ptr + tokens, result, mask=mask, eviction_policy="evict_first")
