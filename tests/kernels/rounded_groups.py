# SPDX-License-Identifier: Apache-2.0
"""What vLLM's grouped softmax router makes of bfloat16 logits, held against the law.

`grouped_topk` (vLLM's fused_moe/router/grouped_topk_router.py, the fallback without a
correction bias) takes softmax in the logits' dtype. That is float32 inside and rounds
each score to bfloat16 once. The maximum of a group and top-k copy numbers, and without
renormalisation and with a factor of 1 (DeepSeek's is applied to the experts' output)
nothing follows: one rounding in all, where the law works in float32.
"""

import torch

from moe_tta.kernels.reference import model_routing

U_BFLOAT16 = 2.0**-8  # unit roundoff: 8 significant bits


def rounds_scores(shape, logits):
    """Whether vLLM's router for this shape, on a GPU, rounds these logits' scores."""
    softmax = shape.scoring == "softmax" and not shape.has_correction_bias
    return shape.grouped and softmax and logits.dtype == torch.bfloat16


def check_rounded(got, logits, rule, rtol):
    """Assert that weights are the law's, rounded once; return the share of clear rows.

    Each weight must be its expert's score within the rounding. Rounding keeps order,
    so a row's weights, sorted, are the law's, unless the best scores of two groups may
    have become equal and another group was taken: rows where they cannot are clear.

    Args:
        got: Weights [T, E], 0 where not chosen.
        logits: [T, E], bfloat16.
        rule: The law's `RoutingRule`.
        rtol: Relative error of float32 weights.
    """
    assert not rule.renormalize
    assert rule.routed_scaling_factor == 1
    loose = (1 + rtol) * (1 + U_BFLOAT16) - 1
    scores, chosen = logits.float().softmax(dim=1), got > 0
    assert (chosen.sum(dim=1) == rule.top_k).all()
    torch.testing.assert_close(got, scores * chosen, rtol=loose, atol=0)
    best = scores.view(len(scores), rule.num_expert_group, -1).amax(dim=2)
    best, last = best.sort(dim=1, descending=True).values, rule.topk_group
    clear = best[:, last - 1] * (1 - loose) > best[:, last] * (1 + loose)
    law = model_routing(logits[clear], rule, rule.top_k).topk_weights
    torch.testing.assert_close(
        got[clear].sort(dim=1).values[:, -rule.top_k :],
        law.sort(dim=1).values,
        rtol=loose,
        atol=0,
    )
    return clear.float().mean()
