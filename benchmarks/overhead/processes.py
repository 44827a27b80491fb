# SPDX-License-Identifier: Apache-2.0
"""The processes of a benchmark: engines on pipes, servers on loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
STOP_SECONDS = 10
LOG_LINES = 40
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class ProcessError(RuntimeError):
    """A process ended early; the message holds the end of its log."""


class Process:
    """A Python module run in a process group of its own, its output in a log file.

    Args:
        args: What follows `python -m`.
        environment: Variables added to ours.
        log: File for what it prints, to stderr only where `pipes` is set.
        pipes: Whether stdin and stdout are pipes.
    """

    def __init__(
        self,
        args: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        pipes: bool = False,
    ):
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as out:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", *args],
                cwd=ROOT,
                stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
                stdout=subprocess.PIPE if pipes else out,
                stderr=out if pipes else subprocess.STDOUT,
                env={**ENVIRONMENT, **os.environ, **environment},
                start_new_session=True,
                text=True,
            )
        self.begin = time.perf_counter()

    def check(self) -> None:
        """Raise ProcessError if the process has ended."""
        if self.popen.poll() is not None:
            raise self.failure()

    def failure(self) -> ProcessError:
        """Return an error that shows the end of the log."""
        lines = self.log.read_text("utf-8", errors="replace").splitlines()
        tail = "\n".join(lines[-LOG_LINES:])
        return ProcessError(f"{self.log.stem} ended early; the end of its log:\n{tail}")

    def stop(self) -> None:
        """End the process and all that it started."""
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self.popen.pid, sign)
            with suppress(subprocess.TimeoutExpired):
                self.popen.wait(STOP_SECONDS)


class EngineProcess(Process):
    """An engine of `benchmarks.overhead.engine`.

    Args:
        spec: `options` of vLLM's LLM, and whether the `plugin` must be on.
        environment: Variables added to ours.
        log: File for what vLLM prints.
    """

    def __init__(self, spec: dict[str, Any], environment: Mapping, log: Path):
        spec = {**spec, "begin": time.time()}
        args = ["benchmarks.overhead.engine", json.dumps(spec)]
        alone = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        super().__init__(args, {**alone, **environment}, log, pipes=True)

    def answer(self) -> dict[str, Any]:
        """Wait for the next line: first the engine's facts, then one per order.

        Raises:
            ProcessError: the engine has ended.
        """
        line = self.popen.stdout.readline()
        if not line:
            self.popen.wait()
            raise self.failure()
        return json.loads(line)

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """Send an order and wait for its answer."""
        try:
            self.popen.stdin.write(json.dumps(order) + "\n")
            self.popen.stdin.flush()
        except BrokenPipeError:
            raise self.failure() from None
        return self.answer()
