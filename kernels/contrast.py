# SPDX-License-Identifier: Apache-2.0
"""Self-contrast of two logits rows of the same model (plain torch)."""

from __future__ import annotations

import torch


def contrast_logits(
    strong: torch.Tensor,
    weak: torch.Tensor,
    beta: float | torch.Tensor,
    alpha: float | torch.Tensor,
) -> torch.Tensor:
    """Return `(1 + beta) * strong - beta * weak` where the strong row is plausible.

    A token is plausible when `strong >= max(strong) + ln alpha`; the others become
    -inf, so at least the strong row's best token stays. Where the difference is not
    finite (a token masked in either row, NaN in the weak one) the strong logit
    stands alone; NaN in the strong row counts as -inf. Written as
    `strong + beta * (strong - weak)`, so that beta = 0 and equal rows return the
    strong logits exactly.

    Source: SCMoE, arXiv 2405.14507.

    Args:
        strong: [N, V] logits under the model's own routing, already divided by their
            temperature.
        weak: [N, V] logits under the weak routing.
        beta: Strength >= 0, one or [N].
        alpha: Plausibility in (0, 1], one or [N].

    Returns:
        [N, V] float32.
    """
    strong = strong.float().nan_to_num(float("-inf"), float("inf"), float("-inf"))
    beta = torch.as_tensor(beta, dtype=torch.float32, device=strong.device)
    alpha = torch.as_tensor(alpha, dtype=torch.float32, device=strong.device)
    difference = strong - weak.float()
    difference = torch.where(difference.isfinite(), difference, 0.0)
    contrasted = strong + beta.reshape(-1, 1) * difference
    cut = strong.amax(dim=1, keepdim=True) + alpha.log().reshape(-1, 1)
    return torch.where(strong < cut, float("-inf"), contrasted)
