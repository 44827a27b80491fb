# SPDX-License-Identifier: Apache-2.0
"""Every strategy family, one folder each, registered here by one line."""

from __future__ import annotations

from moe_tta.strategies.base import PlanContext, Strategy, StrategyParams
from moe_tta.strategies.dynamic_k import DYNAMIC_K
from moe_tta.strategies.steer import STEER

__all__ = ["STRATEGIES", "PlanContext", "Strategy", "StrategyParams", "register"]

STRATEGIES: dict[str, Strategy] = {}


def register(strategy: Strategy) -> None:
    """Add a strategy family to the request object.

    Raises:
        ValueError: the name is taken.
    """
    if strategy.name in STRATEGIES:
        raise ValueError(f"strategy {strategy.name!r} is already registered")
    STRATEGIES[strategy.name] = strategy


register(STEER)
register(DYNAMIC_K)
