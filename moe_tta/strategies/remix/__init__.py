# SPDX-License-Identifier: Apache-2.0
"""remix: borrow the expert pathways of solved neighbours."""

from moe_tta.strategies.base import Strategy
from moe_tta.strategies.remix.params import RemixParams
from moe_tta.strategies.remix.rounds import rounds
from moe_tta.strategies.remix.strategy import check, plan

REMIX = Strategy("remix", RemixParams, plan, check, rounds)
