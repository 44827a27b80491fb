# SPDX-License-Identifier: Apache-2.0
"""Parameters of dynamic_k."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from moe_tta.strategies.base import StrategyParams

Count = Annotated[int, Field(ge=1)]


class DynamicKParams(StrategyParams):
    """Either `k`, or `rank`, or `p` with bounds.

    Attributes:
        k: Experts per token, up to the engine's k_max.
        rank: The only expert a token uses, by its place in the row's ranking from 1.
        p: Take experts until their running probability exceeds p, the crossing one
            included.
        k_min: Fewest experts with `p`; default 1.
        k_max: Most experts with `p`; default the engine's k_max.
    """

    k: Count | None = None
    rank: Count | None = None
    p: Annotated[float, Field(ge=0, le=1)] | None = None
    k_min: Count | None = None
    k_max: Count | None = None

    @model_validator(mode="after")
    def _one_rule(self) -> DynamicKParams:
        if sum(rule is not None for rule in (self.k, self.rank, self.p)) != 1:
            raise PydanticCustomError(
                "one_rule", "expected exactly one of k, rank and p"
            )
        if self.p is None and (self.k_min or self.k_max):
            raise PydanticCustomError("bounds", "expected k_min and k_max only with p")
        return self
