# SPDX-License-Identifier: Apache-2.0
"""A vLLM server on loopback that stops with the block it is used in."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

LOG_LINES = 30  # shown when the server fails
START_SECONDS = 300
STOP_SECONDS = 6
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",  # the lab models are on this disk
}


class ServerError(RuntimeError):
    """The server did not start or died; its log's end was printed."""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def command(model: str, name: str, port: int, settings: dict) -> list[str]:
    """`vllm serve`, by its module: the command stops on the CPU build (docs/log.md)."""
    config = json.dumps({"moe_tta": settings})
    args = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    args += ["--model", model, "--host", "127.0.0.1", "--port", str(port)]
    args += ["--served-model-name", name, "--enforce-eager"]
    args += ["--max-model-len", "1024", "--max-num-seqs", "16"]
    return [*args, "--additional-config", config]


@contextmanager
def serve(model: str, name: str, settings: dict, log: Path) -> Iterator[str]:
    """Run a server.

    Args:
        model: Folder of the model.
        name: What clients call it.
        settings: The plugin's.
        log: File for what the server prints; its end is shown when something fails.

    Yields:
        The server's URL, once it is healthy.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as out:
        server = subprocess.Popen(
            command(model, name, port, settings),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**ENVIRONMENT, **os.environ},
            start_new_session=True,  # one group to stop; Ctrl-C reaches only us
        )
    try:
        _wait_until_healthy(server, url)
        yield url
    except Exception:  # of the block too: the log may say why
        print(f"the end of the server's log:\n{tail(log)}", file=sys.stderr)
        raise
    finally:
        _stop(server)


def _wait_until_healthy(server: subprocess.Popen, url: str) -> None:
    end = time.monotonic() + START_SECONDS
    with httpx.Client(trust_env=False, timeout=5) as client:
        while time.monotonic() < end:
            if server.poll() is not None:
                raise ServerError(f"vllm serve ended with status {server.returncode}")
            try:
                if client.get(f"{url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.3)
    raise ServerError(f"vllm serve was not healthy after {START_SECONDS} s")


def _stop(server: subprocess.Popen) -> None:
    """Stop the server and every process it started."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, sign)
        except ProcessLookupError:
            break
        with suppress(subprocess.TimeoutExpired):
            server.wait(STOP_SECONDS)


def tail(log: Path) -> str:
    lines = log.read_text("utf-8", errors="replace").splitlines()
    return "\n".join(lines[-LOG_LINES:])
