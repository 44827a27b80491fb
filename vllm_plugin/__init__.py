# SPDX-License-Identifier: Apache-2.0
"""The vLLM plugin: per-request routing in stock vLLM."""

from __future__ import annotations

import os


def register() -> None:
    """Install the hooks; vLLM calls this once or more in each of its processes.

    Set `MOE_TTA_DISABLE=1` to leave vLLM untouched.

    Raises:
        RuntimeError: this vLLM version is not supported.
    """
    if os.environ.get("MOE_TTA_DISABLE", "0") not in ("", "0"):
        return
    from moe_tta.vllm_plugin import compat

    compat.check_version()
    compat.install()
