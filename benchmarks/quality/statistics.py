# SPDX-License-Identifier: Apache-2.0
"""Accuracies with intervals, and paired comparisons."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 10_000


def accuracy(right: np.ndarray) -> dict[str, Any]:
    """Mean over questions and its percentile-bootstrap interval.

    Args:
        right: [n] in [0, 1]: whether each question was answered right, or in which
            share of its samples.
    """
    return {"n": len(right), "accuracy": float(right.mean()), **_interval(right)}


def compare(right: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """Difference of two arms on the same questions.

    Args:
        right: [n] in [0, 1], of the arm.
        reference: [n] in [0, 1], of the arm it is compared with.

    Returns:
        `difference` of means with its paired bootstrap interval `low`, `high`; and
        where both are binary the counts `won` and `lost` with `p` of McNemar's exact
        test.
    """
    found = {"difference": float((right - reference).mean())}
    found |= _interval(right - reference)
    if np.isin(right, (0, 1)).all() and np.isin(reference, (0, 1)).all():
        won, lost = int((right > reference).sum()), int((right < reference).sum())
        # binomtest needs a trial; without one nothing speaks against equal
        p = stats.binomtest(won, won + lost, 0.5).pvalue if won + lost else 1.0
        found |= {"won": won, "lost": lost, "p": float(p)}
    return found


def _interval(values: np.ndarray) -> dict[str, float]:
    if len(values) < 2:
        raise ValueError(f"expected at least 2 questions, got {len(values)}")
    with warnings.catch_warnings():
        # all values equal: the interval is that value
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = stats.bootstrap(
            (values,),
            np.mean,
            confidence_level=CONFIDENCE,
            n_resamples=RESAMPLES,
            method="percentile",
            batch=500,
            rng=np.random.default_rng(0),
        ).confidence_interval
    return {"low": float(found.low), "high": float(found.high)}
