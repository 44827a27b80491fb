# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics of pairs, beside vLLM's own, which count a pair as one request.

The scheduler's counts travel with vLLM's statistics, in the field of KV connectors:
the plugin refuses engines with one. They leave it before vLLM's loggers look.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from prometheus_client import Counter, Gauge

FIELD = "moe_tta_pairs"


class PairCounts(NamedTuple):
    """Pairs of one scheduler: those that run now, and totals since its start."""

    running: int
    admitted: int
    preempted: int

    def put(self, stats: Any) -> None:
        """Write into vLLM's `SchedulerStats`."""
        stats.kv_connector_stats = {FIELD: list(self)}

    @staticmethod
    def take(stats: Any) -> PairCounts | None:
        """Remove from vLLM's `SchedulerStats`; `None` where there are none."""
        carried = None if stats is None else stats.kv_connector_stats
        if not carried or FIELD not in carried:
            return None
        stats.kv_connector_stats = None
        return PairCounts(*carried[FIELD])


class PairMetrics:
    """The metrics of one process; `of_process` returns them."""

    def __init__(self):
        labels = ["model_name", "engine"]
        self.running = Gauge(
            "moe_tta:pairs_running",
            "Requests that run with a second stream.",
            labels,
            multiprocess_mode="mostrecent",
        )
        self.admitted = Counter(
            "moe_tta:pairs_admitted", "Requests given a second stream.", labels
        )
        self.preempted = Counter(
            "moe_tta:pairs_preempted",
            "Preemptions of both streams of a request.",
            labels,
        )
        self.refused = Counter(
            "moe_tta:pairs_refused",
            "Requests refused a second stream, with HTTP 400.",
            ["model_name"],
        )

    def observe(self, model: str, engine: int, new: PairCounts, old: PairCounts):
        """Add what has happened since the counts were `old`."""
        labels = model, str(engine)
        self.running.labels(*labels).set(new.running)
        self.admitted.labels(*labels).inc(new.admitted - old.admitted)
        self.preempted.labels(*labels).inc(new.preempted - old.preempted)


of_process = functools.cache(PairMetrics)


def count_refused(vllm_config: Any) -> None:
    """Count a request that is about to be refused."""
    model = vllm_config.model_config.served_model_name
    of_process().refused.labels(model).inc()


def init_counts(original: Callable) -> Callable:
    """Remember whose statistics `StatLoggerManager` will record."""

    def init(self, vllm_config, *args, **kwargs):
        original(self, vllm_config, *args, **kwargs)
        self.moe_tta_model = vllm_config.model_config.served_model_name
        self.moe_tta_counts = {}

    return init


def record_counts(original: Callable) -> Callable:
    """Record the counts of pairs, and hide them from vLLM's loggers."""

    def record(self, scheduler_stats, *args, engine_idx=None, **kwargs):
        counts, engine = PairCounts.take(scheduler_stats), engine_idx or 0
        if counts is not None:
            last = self.moe_tta_counts.get(engine, PairCounts(0, 0, 0))
            of_process().observe(self.moe_tta_model, engine, counts, last)
            self.moe_tta_counts[engine] = counts
        original(self, scheduler_stats, *args, engine_idx=engine_idx, **kwargs)

    return record
