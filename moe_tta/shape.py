# SPDX-License-Identifier: Apache-2.0
"""What a plan must know about a model's routers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

Scoring = Literal["softmax", "topk_softmax", "sigmoid", "sqrtsoftplus"]


@dataclass(frozen=True)
class RouterShape:
    """Router constants of one model, equal in all its MoE layers.

    `layers` are decoder-layer numbers as the checkpoint counts them
    (`model.layers.N`), ascending; a plan's arrays are indexed by position in it.
    `top_k` is the model's own number of experts per token, `k_max` the width the
    engine was built for (`k_max >= top_k`).
    """

    layers: tuple[int, ...]
    num_hidden_layers: int
    num_experts: int
    top_k: int
    k_max: int
    scoring: Scoring = "softmax"
    renormalize: bool = True
    num_expert_group: int = 1
    topk_group: int = 1
    has_correction_bias: bool = False
    routed_scaling_factor: float = 1.0

    @property
    def is_distribution(self) -> bool:
        """Whether selection scores are a probability distribution over experts."""
        return (
            self.scoring in ("softmax", "topk_softmax") and not self.has_correction_bias
        )

    @property
    def grouped(self) -> bool:
        """Whether experts are first chosen by group (DeepSeek, GLM)."""
        return self.num_expert_group > 1

    def difference(self, other: RouterShape) -> str:
        """Name every field in which two shapes differ; empty when equal."""
        mine, theirs = asdict(self), asdict(other)
        return ", ".join(
            f"{name} {mine[name]} != {theirs[name]}"
            for name in mine
            if mine[name] != theirs[name]
        )
