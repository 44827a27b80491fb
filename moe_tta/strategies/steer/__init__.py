# SPDX-License-Identifier: Apache-2.0
"""steer: edit named experts, inline or from a saved artefact."""

from moe_tta.strategies.base import Strategy
from moe_tta.strategies.steer.params import SteerParams
from moe_tta.strategies.steer.strategy import plan

STEER = Strategy("steer", SteerParams, plan)
