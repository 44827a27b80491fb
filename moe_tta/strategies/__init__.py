# SPDX-License-Identifier: Apache-2.0
"""Every strategy family, one folder each, registered here by one line."""

from __future__ import annotations

from moe_tta.strategies.base import (
    PairStrategy,
    PlanContext,
    Prompt,
    Strategy,
    StrategyParams,
)
from moe_tta.strategies.contrast import CONTRAST
from moe_tta.strategies.dynamic_k import DYNAMIC_K
from moe_tta.strategies.knn import KNN
from moe_tta.strategies.remix import REMIX
from moe_tta.strategies.reroute import REROUTE
from moe_tta.strategies.rounds import RoundStrategy
from moe_tta.strategies.steer import STEER

__all__ = [
    "PAIRS",
    "ROUNDS",
    "STRATEGIES",
    "PairStrategy",
    "PlanContext",
    "Prompt",
    "RoundStrategy",
    "Strategy",
    "StrategyParams",
    "register",
    "register_pair",
    "register_rounds",
]

STRATEGIES: dict[str, Strategy] = {}
PAIRS: dict[str, PairStrategy] = {}
ROUNDS: dict[str, RoundStrategy] = {}


def register(strategy: Strategy) -> None:
    """Add a strategy family to the request object.

    Raises:
        ValueError: the name is taken.
    """
    _check_free(strategy.name)
    STRATEGIES[strategy.name] = strategy


def register_pair(strategy: PairStrategy) -> None:
    """Add a family of two streams to the request object.

    Raises:
        ValueError: the name is taken.
    """
    _check_free(strategy.name)
    PAIRS[strategy.name] = strategy


def register_rounds(strategy: RoundStrategy) -> None:
    """Add a family that works in rounds to the request object.

    Raises:
        ValueError: the name is taken.
    """
    _check_free(strategy.name)
    ROUNDS[strategy.name] = strategy


def _check_free(name: str) -> None:
    if name in {*STRATEGIES, *PAIRS, *ROUNDS}:
        raise ValueError(f"strategy {name!r} is already registered")


register(STEER)
register(DYNAMIC_K)
register(REMIX)
register(KNN)
register_pair(CONTRAST)
register_rounds(REROUTE)
