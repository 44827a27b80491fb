# SPDX-License-Identifier: Apache-2.0
"""Build a request's routing parameters for vLLM, offline and over HTTP."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from moe_tta.errors import RequestError, show
from moe_tta.spec import NAME, PARAMETER, as_json, parse


@dataclass(frozen=True)
class Request:
    """Checked parameters, in every form vLLM takes them.

    Attributes:
        value: The request object as JSON types, or the name of a preset.
    """

    value: dict[str, Any] | str

    @property
    def extra_args(self) -> dict[str, Any]:
        """For `SamplingParams(extra_args=...)`."""
        return {PARAMETER: self.value}

    @property
    def vllm_xargs(self) -> dict[str, str]:
        """For the `vllm_xargs` member of an HTTP body, which holds no objects."""
        text = self.value if isinstance(self.value, str) else json.dumps(self.value)
        return {PARAMETER: text}

    @property
    def extra_body(self) -> dict[str, Any]:
        """For the OpenAI client's `extra_body=...`."""
        return {"vllm_xargs": self.vllm_xargs}


def request(*, preset: str | None = None, **members: Any) -> Request:
    """Check a request's form; whether it fits the model is the server's to say.

    Args:
        preset: Name of an operator's preset, instead of members.
        **members: Members of the request object: one per strategy family (`steer`,
            `dynamic_k`), and `renorm`.

    Raises:
        RequestError: a member is unknown or malformed, or both kinds are given.

    Example:
        >>> request(dynamic_k={"k": 4}, renorm="always").vllm_xargs
        {'moe_tta': '{"dynamic_k": {"k": 4}, "renorm": "always"}'}
    """
    if preset is None:
        parse(members, presets={})
        return Request(as_json(members))
    if members:
        raise RequestError(
            f"expected a preset or members, got both ({', '.join(members)})", PARAMETER
        )
    if not isinstance(preset, str) or not re.fullmatch(NAME, preset):
        raise RequestError(
            f"expected a preset's name ({NAME}), got {show(preset)}", PARAMETER, preset
        )
    return Request(preset)
