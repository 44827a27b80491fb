# SPDX-License-Identifier: Apache-2.0
"""dynamic_k: how many experts a token uses, fixed or by cumulative mass."""

from moe_tta.strategies.base import Strategy
from moe_tta.strategies.dynamic_k.params import DynamicKParams
from moe_tta.strategies.dynamic_k.strategy import plan

DYNAMIC_K = Strategy("dynamic_k", DynamicKParams, plan)
