# SPDX-License-Identifier: Apache-2.0
"""How two logits rows of one text become one (plain torch)."""

from __future__ import annotations

from collections.abc import Callable

import torch

# an implausible token's offset in logits: no probability is left beside a plausible
# one, yet masks that come later (min_tokens, allowed tokens) find an order among them
IMPLAUSIBLE = 1e4


def contrast_logits(
    strong: torch.Tensor,
    weak: torch.Tensor,
    beta: float | torch.Tensor,
    alpha: float | torch.Tensor,
) -> torch.Tensor:
    """Return `(1 + beta) * strong - beta * weak` where the strong row is plausible.

    A token is plausible when `strong >= max(strong) + ln alpha`. The others keep
    their strong logit less `IMPLAUSIBLE`. Where the difference is not finite (a token
    masked in either row, NaN in the weak one) the strong logit stands alone; NaN in
    the strong row counts as -inf. Written as `strong + beta * (strong - weak)`, so
    that beta = 0 and equal rows return the strong logits exactly.

    Source: SCMoE, arXiv 2405.14507, equations 4 and 5.
    Differs: implausible tokens get -inf there, and a later mask of all plausible
    tokens would leave none.

    Args:
        strong: [N, V] logits under the strong routing, already masked by a grammar.
        weak: [N, V] logits under the weak routing.
        beta: Strength >= 0, one or [N].
        alpha: Plausibility in [0, 1], one or [N]; 0 keeps every token.

    Returns:
        [N, V] float32.
    """
    strong = strong.float().nan_to_num(float("-inf"), float("inf"), float("-inf"))
    beta = torch.as_tensor(beta, dtype=torch.float32, device=strong.device)
    alpha = torch.as_tensor(alpha, dtype=torch.float32, device=strong.device)
    difference = strong - weak.float()
    difference = torch.where(difference.isfinite(), difference, 0.0)
    contrasted = strong + beta.reshape(-1, 1) * difference
    # in float64, so that every implementation rounds to the same float32
    log_alpha = alpha.double().log().float()
    cut = strong.amax(dim=1, keepdim=True) + log_alpha.reshape(-1, 1)
    return torch.where(strong < cut, strong - IMPLAUSIBLE, contrasted)


# name -> f(first [N, V], second [N, V], *numbers [N]) -> [N, V] float32
COMBINE: dict[str, Callable[..., torch.Tensor]] = {"contrast": contrast_logits}
