# SPDX-License-Identifier: Apache-2.0
"""Parameters of knn."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from moe_tta.plan import MAX_RECALLED
from moe_tta.strategies.base import StrategyParams


class KnnParams(StrategyParams):
    """A token store and how many neighbours each token has in it.

    Source: kNN-MoE, arXiv 2601.02144; its number of neighbours is unconfirmed, the
    default is ours.

    Attributes:
        store: Name of an operator's token store.
        k: Neighbours of a token in each layer, the nearest.
    """

    store: str
    k: Annotated[int, Field(ge=1, le=MAX_RECALLED)] = 8
