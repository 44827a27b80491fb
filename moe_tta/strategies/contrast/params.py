# SPDX-License-Identifier: Apache-2.0
"""Parameters of contrast, and how its two streams' logits are combined."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from moe_tta.strategies.base import PairParams

# the implausible tokens' offset in the combination must exceed any contrast
MAX_BETA = 10.0


class ContrastParams(PairParams):
    """Strengthen what the weak routing would not have said.

    Source: SCMoE, arXiv 2405.14507, section 3 (beta 0.5, alpha 0.1).

    Attributes:
        beta: Strength, 0..`MAX_BETA`.
        alpha: A token stays plausible while its strong probability is at least this
            share of the best one's, 0..1; 0 keeps every token.
    """

    beta: Annotated[float, Field(ge=0, le=MAX_BETA)] = 0.5
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.1


def combination(params: ContrastParams) -> tuple[str, tuple[float, ...]]:
    """Name the combination and give its numbers."""
    return "contrast", (params.beta, params.alpha)
