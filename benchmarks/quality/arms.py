# SPDX-License-Identifier: Apache-2.0
"""Arms: the ways to answer that are compared on the same questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from benchmarks.quality.tasks.question import TextQuestion
from moe_tta.compile import compile_request
from moe_tta.compiled import CompiledRequest
from moe_tta.shape import RouterShape
from moe_tta.spec import parse
from moe_tta.strategies import PlanContext


@dataclass(frozen=True)
class Vote:
    """Several sampled texts a question, of which the most frequent answer counts.

    Attributes:
        samples: How many.
        temperature: Of sampling; 0 is greedy.
    """

    samples: int
    temperature: float


@dataclass(frozen=True)
class Arm:
    """One way to answer every question.

    Attributes:
        name: In tables and journals.
        family: Of a family's arms one is chosen on the tuning part and tested.
        request: The request object, in moe-tta's own parameters; empty is the model.
        examples: Questions that it sees with their solutions before each question; no
            arm is asked them.
        vote: Its own number of texts, instead of the command line's.
    """

    name: str
    family: str
    request: dict[str, Any] = field(hash=False)
    examples: tuple[TextQuestion, ...] = ()
    vote: Vote | None = None

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


def in_context(examples: Sequence[TextQuestion], counts: list[int]) -> list[Arm]:
    """Baselines that see worked examples, the first of those given."""
    return [
        Arm(f"in context {n}", "in context", {}, tuple(examples[:n])) for n in counts
    ]


def votes(counts: list[int], temperature: float) -> list[Arm]:
    """Baselines of several sampled texts (self-consistency)."""
    return [
        Arm(f"vote of {n} at {temperature}", "vote", {}, vote=Vote(n, temperature))
        for n in counts
    ]


def reroute(swept: Mapping[str, Sequence[Any]]) -> list[Arm]:
    """Every combination of settings of online rerouting.

    Ordered so that the first of equally good arms is the most cautious one: smallest
    rate, fewest steps, fewest rounds, fewest layers.

    Args:
        swept: Values of `reroute.lr`, `steps`, `every`, `share`, `sign` and `mode`.
    """
    cautious = {
        "lr": sorted(swept["lr"]),
        "steps": sorted(swept["steps"]),
        # 0 is a single round; after it, the longer between rounds the fewer
        "every": sorted(swept["every"], key=lambda every: (every > 0, -every)),
        "share": sorted(swept["share"]),
        "sign": swept["sign"],
        "mode": swept["mode"],
    }
    settings = [
        dict(zip(cautious, values, strict=True))
        for values in product(*cautious.values())
    ]
    return [
        Arm(f"reroute {label(given)}", "reroute", {"reroute": given})
        for given in settings
    ]


def label(settings: Mapping[str, Any]) -> str:
    """Name settings in a few characters."""
    return ",".join(f"{key}={value}" for key, value in settings.items())
