# SPDX-License-Identifier: Apache-2.0
"""The operator's settings, from `--additional-config '{"moe_tta": {...}}'`."""

from __future__ import annotations

from typing import Any

from moe_tta.settings import EngineSettings


def read_settings(vllm_config: Any) -> EngineSettings:
    """Return the engine's settings; every process reads the same ones.

    Raises:
        SettingsError: naming the setting, what was expected and got.
    """
    given = vllm_config.additional_config
    section = given.get("moe_tta", {}) if isinstance(given, dict) else {}
    return EngineSettings.read(section)
