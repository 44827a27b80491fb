# SPDX-License-Identifier: Apache-2.0
"""`make demo`: stock `vllm serve`, one mixed batch, a table and a heat map."""

import argparse
import asyncio
import signal
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from transformers import AutoConfig

from benchmarks.demo.cases import Case, cases, settings
from benchmarks.demo.client import MODEL, Answer, ask_all
from benchmarks.demo.report import Result, faults, print_table
from benchmarks.demo.server import ServerError, serve
from benchmarks.demo.store import build_store
from benchmarks.demo.traces import find_trace, read_routing
from moe_tta.adapter.families import FAMILIES
from moe_tta.lab import MODELS, lab_path
from moe_tta.plots import routing_heat_map
from moe_tta.shape import RouterShape
from moe_tta.vllm_plugin.model_shape import shape_from_config

PROMPT = "The fox looked at the moon and"
TOKENS = 48
LOG_WIDTH = 110  # columns, where the output is no terminal


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.demo", description=__doc__)
    parser.add_argument("--model", default="smollm2-moe", help="lab model or folder")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--out", type=Path, default=Path("demo-out"))
    return parser.parse_args()


def find_model(name: str, console: Console) -> tuple[str, RouterShape, bool]:
    """Return a model's folder, its routers, and whether requests can adapt to them."""
    folder = name
    if name in MODELS:
        console.print(f"lab model {name}: {MODELS[name].summary}")
        folder = str(lab_path(name))
    config = AutoConfig.from_pretrained(folder)
    shape = shape_from_config(config)
    if shape is None:
        sys.exit(f"{name} has no MoE layers")
    return folder, shape, config.model_type in FAMILIES


def run(args: argparse.Namespace, console: Console, scratch: Path) -> list[str]:
    """Serve, ask, show; returns what did not come as expected."""
    model, shape, adapted = find_model(args.model, console)
    todo = cases(shape, adapted)
    traces = scratch / "traces"
    store = None
    if shape.is_distribution:
        with console.status("building a store of solved questions"):
            store = str(build_store(model, scratch))
    options = settings(shape, str(traces), store, adapted)
    start = time.perf_counter()
    with (
        console.status("starting vllm serve") as status,
        serve(model, MODEL, options, scratch / "server.log") as url,
    ):
        console.print(
            f"vllm serve is healthy after {time.perf_counter() - start:.0f} s"
        )
        status.update(f"{len(todo)} requests in one batch")
        answers = asyncio.run(ask_all(url, todo, args.prompt, TOKENS))
        status.update("reading traces")
        results = [
            _result(c, a, traces, shape) for c, a in zip(todo, answers, strict=True)
        ]
        status.update("stopping the server")
    console.print(f"prompt: {args.prompt}")
    print_table(console, results)
    wrong = faults(results)
    if not wrong:
        console.print(f"heat map: {draw(results, shape, args.out)}")
    return wrong


def _result(case: Case, answer: Answer, traces: Path, shape: RouterShape) -> Result:
    if answer.status != 200:
        return case, answer, None
    path = find_trace(traces, answer.id)
    return case, answer, read_routing(path, shape.num_experts)


def draw(results: list[Result], shape: RouterShape, out: Path) -> Path:
    (_, _, plain), (_, _, steered) = results[:2]
    out.mkdir(parents=True, exist_ok=True)
    path = out / "heatmap.png"
    titles = ("plain request", "steered request", "steered minus plain")
    figure = routing_heat_map(plain.shares, steered.shares, shape.layers, titles)
    figure.savefig(path, dpi=120)
    return path


def main() -> None:
    # a plain kill must stop the server too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
    args = parse_args()
    with tempfile.TemporaryDirectory(prefix="moe-tta-demo-") as scratch:
        try:
            wrong = run(args, console, Path(scratch))
        except KeyboardInterrupt:
            sys.exit(130)
        except ServerError as err:
            sys.exit(str(err))
    for line in wrong:
        console.print(f"not as expected: {line}", style="red")
    if wrong:
        sys.exit(1)
    console.print("every request came as expected", style="green")


if __name__ == "__main__":
    main()
