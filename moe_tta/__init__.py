# SPDX-License-Identifier: Apache-2.0
"""Test-time routing for Mixture-of-Experts models."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Any

# imported on first use: every vLLM process loads this package at start-up
_LAZY = {
    "RouterShape": "moe_tta.shape",
    "RoutingPlan": "moe_tta.plan",
    "request": "moe_tta.client",
}

__all__ = ["RouterShape", "RoutingPlan", "__version__", "request"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("moe-tta")
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
