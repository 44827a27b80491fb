# SPDX-License-Identifier: Apache-2.0
"""The jobs that ask the engine for losses, by `Work.service`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moe_tta.shape import RouterShape
from moe_tta.vllm_plugin.probes import ProbeJob
from moe_tta.vllm_plugin.reroute_probes import reroute_by_probes
from moe_tta.vllm_plugin.services import Text

# text, routers, the round's number, `Work.arguments`
JOBS: dict[str, Callable[[Text, RouterShape, int, Mapping[str, Any]], ProbeJob]] = {
    "reroute": reroute_by_probes,
}
