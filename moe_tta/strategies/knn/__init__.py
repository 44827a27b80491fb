# SPDX-License-Identifier: Apache-2.0
"""knn: every token borrows the expert assignments of reference tokens like it."""

from moe_tta.strategies.base import Strategy
from moe_tta.strategies.knn.params import KnnParams
from moe_tta.strategies.knn.strategy import plan

KNN = Strategy("knn", KnnParams, plan)
