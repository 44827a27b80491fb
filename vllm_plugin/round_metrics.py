# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics of rounds, counted where their reports reach the API process."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import Counter


class RoundMetrics:
    """The metrics of one process; `of_process` returns them."""

    def __init__(self):
        self.rounds = Counter(
            "moe_tta:reroute_rounds",
            "Rounds of adaptation that ended, by what became of them.",
            ["model_name", "outcome"],
        )
        self.seconds = Counter(
            "moe_tta:reroute_seconds",
            "Seconds of the worker spent on rounds.",
            ["model_name"],
        )
        self.tokens = Counter(
            "moe_tta:reroute_context_tokens",
            "Tokens of text that rounds were given to read.",
            ["model_name"],
        )


of_process = functools.cache(RoundMetrics)


def observe(model: str, reports: Iterable[Mapping[str, Any]]) -> None:
    """Count rounds from their reports."""
    metrics = of_process()
    for report in reports:
        metrics.rounds.labels(model, report["outcome"]).inc()
        metrics.seconds.labels(model).inc(report["milliseconds"] / 1e3)
        metrics.tokens.labels(model).inc(report["context"])
