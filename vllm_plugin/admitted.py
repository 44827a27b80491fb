# SPDX-License-Identifier: Apache-2.0
"""Whether an engine request has passed admission."""

from __future__ import annotations

from typing import Any

from moe_tta.errors import RequestError
from moe_tta.spec import PARAMETER
from moe_tta.vllm_plugin import compat
from moe_tta.vllm_plugin.pairs import PAIR, Ask
from moe_tta.vllm_plugin.round_orders import ROUNDS


def check_admitted(request: Any) -> None:
    """Refuse an engine request whose `moe_tta` was never compiled.

    Raises:
        VLLMValidationError: it was built by hand; a worker could not read it.
    """
    params = request.sampling_params
    extra_args = (params.extra_args or {}) if params is not None else {}
    for key, looks_compiled in (
        (PARAMETER, lambda wire: "segments" in wire),
        (PAIR, Ask.is_wire),
        (ROUNDS, lambda wire: "schedule" in wire),
    ):
        wire = extra_args.get(key)
        if wire is not None and not (isinstance(wire, dict) and looks_compiled(wire)):
            message = "expected a prompt, not an EngineCoreRequest built by hand"
            raise compat.request_error(RequestError(message, key))
