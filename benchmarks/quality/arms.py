# SPDX-License-Identifier: Apache-2.0
"""Arms: the request objects that are compared on the same questions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moe_tta.compile import compile_request
from moe_tta.compiled import CompiledRequest
from moe_tta.shape import RouterShape
from moe_tta.spec import parse
from moe_tta.strategies import PlanContext


@dataclass(frozen=True)
class Arm:
    """One way to answer every question.

    Attributes:
        name: In tables and journals.
        family: Of a family's arms one is chosen on the tuning part and tested.
        request: The request object, in moe-tta's own parameters; empty is the model.
    """

    name: str
    family: str
    request: dict[str, Any] = field(hash=False)

    def compiled(self, shape: RouterShape) -> CompiledRequest:
        """Check the request against a model and write its plans.

        Raises:
            RequestError: the model's routers cannot honour it.
        """
        return compile_request(parse(self.request, presets={}), PlanContext(shape))


PLAIN = Arm("plain", "plain", {})


def fixed_k(counts: list[int]) -> list[Arm]:
    """Baselines with another number of experts per token."""
    return [Arm(f"k={k}", "fixed k", {"dynamic_k": {"k": k}}) for k in counts]


def top_p(masses: list[float]) -> list[Arm]:
    """Baselines with as many experts as carry a probability mass."""
    return [Arm(f"p={p}", "top-p", {"dynamic_k": {"p": p}}) for p in masses]


def contrast(weak: list[dict], betas: list[float], alphas: list[float]) -> list[Arm]:
    """Every combination of weak routing, strength and plausibility threshold.

    Ordered so that the first of equally good arms is the most cautious one: smallest
    beta, then the order in which weak routings and thresholds are given.

    Args:
        weak: Values of `contrast.weak` such as `{"rank": 2}`.
        betas: Values of `contrast.beta`.
        alphas: Values of `contrast.alpha`.
    """
    return [
        Arm(
            f"contrast {label(routing)} beta={beta} alpha={alpha}",
            "contrast",
            {"contrast": {"weak": routing, "beta": beta, "alpha": alpha}},
        )
        for beta in sorted(betas)
        for routing in weak
        for alpha in alphas
    ]


def label(weak: dict[str, Any]) -> str:
    """Name a weak routing in a few characters."""
    return ",".join(f"{key}={value}" for key, value in weak.items())
