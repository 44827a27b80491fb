# SPDX-License-Identifier: Apache-2.0
"""contrast: the model against itself under a weaker routing."""

from moe_tta.strategies.base import PairStrategy
from moe_tta.strategies.contrast.params import ContrastParams, combination

CONTRAST = PairStrategy(
    "contrast",
    ContrastParams,
    combination,
    shorthands={"rank": ("dynamic_k", "rank"), "k": ("dynamic_k", "k")},
)
