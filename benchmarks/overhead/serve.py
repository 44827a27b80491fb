# SPDX-License-Identifier: Apache-2.0
"""Latency under load: two OpenAI servers, stock and with the plugin, in turn.

Both live on one device at the same time; the client is that of `vllm bench serve`, at
a fixed request rate, the same random prompts for every mode of a round. In mode
`all-same` every request carries the same plan, in `vllm_xargs`: the client has one
`--extra-body` for all requests, so that plans of their own cannot be had here. The
rest is as in the engine benchmark.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import moe_tta
from benchmarks.overhead.models import DTYPE_BYTES, Model, round_up
from benchmarks.overhead.modes import AGAIN, ENGINE_OF, STOCK, engine_kind, requests
from benchmarks.overhead.processes import ProcessError
from benchmarks.overhead.ratios import lines, summarise
from benchmarks.overhead.record import ResultFile, conditions
from benchmarks.overhead.rounds import Deadline
from benchmarks.overhead.servers import CAPTURE_SIZES, ServerProcess, load, served
from benchmarks.overhead.tokenizer import servable

SERVED = (STOCK, AGAIN, "idle", "all-same")
METRICS = ("p50_ttft_ms", "p99_ttft_ms", "p50_tpot_ms", "p99_tpot_ms")
WARM_PROMPTS = 16


def parser() -> argparse.ArgumentParser:
    """Return the parser of the server benchmark."""
    parser = argparse.ArgumentParser("benchmarks.overhead serve", description=__doc__)
    parser.add_argument(
        "--model", default="olmoe", help="olmoe, qwen3-30b or a folder with a config"
    )
    parser.add_argument("--rate", type=float, default=16, help="requests per second")
    parser.add_argument("--num-prompts", type=int, default=160)
    parser.add_argument("--input-len", type=int, default=256, help="tokens")
    parser.add_argument("--output-len", type=int, default=64, help="tokens")
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5, help="rounds at most")
    parser.add_argument(
        "--budget", type=float, default=400, help="seconds; later no round starts"
    )
    parser.add_argument("--dtype", choices=DTYPE_BYTES, default="bfloat16")
    parser.add_argument("--eager", action="store_true", help="no graphs, no compile")
    parser.add_argument("--out", type=Path, help="results/serve-MODEL.json")
    return parser


def server_options(
    args: argparse.Namespace, model: Model, folder: Path
) -> dict[str, Any]:
    """Return vLLM's options, the same for both servers but the plugin's."""
    length = round_up(args.input_len + args.output_len + 8)
    options = {
        "model": folder,
        "load-format": model.load_format,
        "dtype": args.dtype,
        "max-model-len": length,
        "max-num-seqs": args.max_num_seqs,
        "no-enable-prefix-caching": True,
        "gpu-memory-utilization": 0.45,
        "kv-cache-memory-bytes": model.kv_bytes(args.max_num_seqs * length, args.dtype),
    }
    if args.eager:
        return {**options, "enforce-eager": True}
    captured = [size for size in CAPTURE_SIZES if size <= args.max_num_seqs]
    graphs = {"cudagraph_capture_sizes": captured}
    return {**options, "compilation-config": json.dumps(graphs)}


def client_options(
    args: argparse.Namespace, number: int, prompts: int
) -> dict[str, Any]:
    """Return the client's options; the prompts differ by the round's number."""
    return {
        "request-rate": args.rate,
        "num-prompts": prompts,
        "random-input-len": args.input_len,
        "random-output-len": args.output_len,
        "seed": number,
    }


class Load:
    """Runs the client against the servers, mode by mode.

    Args:
        servers: By engine kind.
        args: The command line.
        model: The model served.
        tokenizer: Folder of its tokenizer.
    """

    def __init__(
        self,
        servers: dict[str, ServerProcess],
        args: argparse.Namespace,
        model: Model,
        tokenizer: Path,
    ):
        self.servers = servers
        self.args = args
        self.model = model
        self.tokenizer = tokenizer
        self.log = args.out.with_name(f"{args.out.stem}-client.log")

    def ask(self, mode: str, number: int, prompts: int) -> dict[str, Any]:
        """Return the client's result for one mode."""
        plan = requests(mode, self.model.shape, 1, number)[0]
        body = {} if plan is None else moe_tta.request(**plan).extra_body
        options = client_options(self.args, number, prompts)
        server = self.servers[ENGINE_OF[mode]]
        return load(server.url, self.tokenizer, self.log, options, body)

    def round(self, number: int) -> list[dict[str, Any]]:
        """Ask every mode once, in an order drawn by the round's number."""
        samples = []
        for mode in random.Random(number).sample(SERVED, len(SERVED)):
            found = self.ask(mode, number, self.args.num_prompts)
            samples += [
                {
                    "group": 0,
                    "round": number,
                    "mode": mode,
                    "measure": metric.removesuffix("_ms"),
                    "size": str(self.args.num_prompts),
                    "seconds": found[metric] / 1e3,
                }
                for metric in METRICS
            ]
        return samples


def run(args: argparse.Namespace, begin: float, scratch: Path) -> dict[str, Any]:
    """Start both servers, measure, write after every round."""
    model = Model.find(args.model)
    folder = servable(model, scratch)
    run: dict[str, Any] = {
        "benchmark": "serve",
        "conditions": conditions(vars(args), model),
        "samples": [],
    }
    file = ResultFile(args.out)
    kinds = [engine_kind(name, model.shape) for name in ("stock", "plugin")]
    logs = args.out.with_suffix("")
    with served(kinds, server_options(args, model, folder), logs) as (servers, starts):
        run["start_s"] = starts
        print("servers are healthy:", starts, flush=True)
        client = Load(servers, args, model, folder)
        for mode in SERVED:
            client.ask(mode, 0, WARM_PROMPTS)
        deadline = Deadline(begin + args.budget)
        for number in range(1, args.repeat + 1):
            if number > 1 and not deadline.allows_another():
                print(f"stopped after round {number - 1}: out of time", flush=True)
                break
            started = time.perf_counter()
            run["samples"] += client.round(number)
            run["summary"] = summarise(run["samples"])
            file.write(run)
            took = time.perf_counter() - started
            deadline.longest = max(deadline.longest, took)
            print(f"round {number}: {took:.1f} s", flush=True)
    return run


def main(words: list[str]) -> int:
    """Run the server benchmark; return the exit status."""
    begin = time.perf_counter()
    args = parser().parse_args(words)
    args.out = args.out or Path(
        f"benchmarks/results/serve-{Path(args.model).name}.json"
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            found = run(args, begin, Path(scratch))
    except (ProcessError, ValueError) as err:
        print(err, file=sys.stderr)
        return 1
    print("\n".join(lines(found["summary"])))
    print(f"wrote {args.out}")
    return 0
