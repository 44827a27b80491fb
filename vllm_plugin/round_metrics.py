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
        labels = ["model_name", "service"]
        self.rounds = Counter(
            "moe_tta:rounds",
            "Rounds of adaptation that ended, by what became of them.",
            [*labels, "outcome"],
        )
        self.seconds = Counter(
            "moe_tta:round_seconds", "Seconds of the worker spent on rounds.", labels
        )
        self.tokens = Counter(
            "moe_tta:round_context_tokens",
            "Tokens of text that rounds were given to read.",
            labels,
        )


of_process = functools.cache(RoundMetrics)


def observe(model: str, reports: Iterable[Mapping[str, Any]]) -> None:
    """Count rounds from their reports."""
    metrics = of_process()
    for report in reports:
        labels = model, report["service"]
        metrics.rounds.labels(*labels, report["outcome"]).inc()
        metrics.seconds.labels(*labels).inc(report["milliseconds"] / 1e3)
        if report["start"] is not None:
            metrics.tokens.labels(*labels).inc(report["context"])
