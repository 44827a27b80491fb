# SPDX-License-Identifier: Apache-2.0
"""Experts that skip a token's unused columns, instead of computing them for nothing."""

from __future__ import annotations

from typing import Any

from moe_tta.vllm_plugin import compat


def let_experts_skip(runner: Any) -> bool:
    """Make the layer's experts skip columns of id -1, where they can.

    vLLM's Triton experts launch nothing for such a column, so the column's row of the
    workspace is never written; the sum over columns must leave it out. Stock vLLM
    takes the sum that does so under expert parallelism only.

    Returns:
        Whether id -1 is skipped and summed rightly. If not, unused columns must
        repeat an expert with weight 0.
    """
    experts = runner.routed_experts.quant_method.moe_kernel.fused_experts
    if not compat.is_triton_experts(experts) or _scales_by_all_rows(experts):
        return False
    compat.sum_used_columns()
    return True


def _scales_by_all_rows(experts: Any) -> bool:
    """Whether one dynamic scale spans all rows of the workspace, unwritten ones too."""
    return (
        experts.quant_dtype is not None
        and experts.a2_scale is None
        and experts.block_shape is None
        and (not experts.per_act_token_quant or experts.quantization_emulation)
    )
