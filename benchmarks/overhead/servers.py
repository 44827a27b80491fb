# SPDX-License-Identifier: Apache-2.0
"""OpenAI servers on loopback, and load on them by vLLM's own client."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import httpx

from benchmarks.overhead.modes import EngineKind
from benchmarks.overhead.processes import Process, ProcessError

NAME = "model"  # what clients call it
START_SECONDS = 400
CAPTURE_SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256]  # fewer than vLLM's: quicker start


def server_args(kind: EngineKind, port: int, options: dict[str, Any]) -> list[str]:
    """Return the server's command line; `options` of vLLM come without dashes."""
    args = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", NAME]
    args += ["--additional-config", json.dumps(kind.additional_config)]
    for name, value in options.items():
        args += [f"--{name}", *([] if value is True else [str(value)])]
    return args


def client_args(
    url: str, tokenizer: Path, options: dict[str, Any], extra_body: dict[str, Any]
) -> list[str]:
    """Return the command line of `vllm bench serve`; see `load`."""
    args = ["--backend", "openai", "--base-url", url, "--model", NAME]
    args += ["--tokenizer", str(tokenizer), "--dataset-name", "random"]
    args += ["--percentile-metrics", "ttft,tpot", "--metric-percentiles", "50,99"]
    args += ["--ignore-eos", "--disable-tqdm", "--temperature", "0"]
    if extra_body:
        args += ["--extra-body", json.dumps(extra_body)]
    for name, value in options.items():
        args += [f"--{name}", str(value)]
    return args


class ServerProcess(Process):
    """`vllm serve`, by its module: the CPU wheel's command does not start.

    Args:
        kind: The engine's kind.
        options: vLLM's options, without dashes.
        log: File for what it prints.
    """

    def __init__(self, kind: EngineKind, options: dict[str, Any], log: Path):
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        module = "vllm.entrypoints.openai.api_server"
        args = [module, *server_args(kind, port, options)]
        super().__init__(args, kind.environment, log)

    def wait(self) -> float:
        """Return the seconds from start to health.

        Raises:
            ProcessError: it ended, or is not healthy after `START_SECONDS`.
        """
        with httpx.Client(trust_env=False, timeout=5) as client:
            while time.perf_counter() - self.begin < START_SECONDS:
                self.check()
                try:
                    if client.get(f"{self.url}/health").status_code == 200:
                        return time.perf_counter() - self.begin
                except httpx.TransportError:
                    pass
                time.sleep(0.2)
        raise ProcessError(f"{self.log.stem} is not healthy after {START_SECONDS} s")


@contextmanager
def served(
    kinds: Sequence[EngineKind], options: dict[str, Any], logs: Path
) -> Iterator[tuple[dict[str, ServerProcess], dict[str, float]]]:
    """Run servers at once; yield them and their start-up seconds, by kind."""
    with ExitStack() as stack:
        servers = {}
        for kind in kinds:
            log = logs.with_name(f"{logs.stem}-{kind.name}.log")
            servers[kind.name] = ServerProcess(kind, options, log)
            stack.callback(servers[kind.name].stop)
        yield servers, {name: server.wait() for name, server in servers.items()}


def load(
    url: str, tokenizer: Path, log: Path, options: dict[str, Any], extra_body: dict
) -> dict[str, Any]:
    """Run what `vllm bench serve` runs, in this process; return its result.

    Args:
        url: The server's.
        tokenizer: Folder of the tokenizer, for the random prompts.
        log: File for what the client prints.
        options: The client's options, without dashes.
        extra_body: Added to every request's body; empty for none.

    Raises:
        RuntimeError: a request failed.
    """
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    args = parser.parse_args(client_args(url, tokenizer, options, extra_body))
    with log.open("a") as out, redirect_stdout(out):
        found = main(args)
    if found["failed"]:
        raise RuntimeError(f"{found['failed']} requests failed, see {log.name}")
    return found
