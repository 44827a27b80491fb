# SPDX-License-Identifier: Apache-2.0
"""Which engines run at once, their options, their start and end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.overhead.models import Model, round_up
from benchmarks.overhead.modes import ENGINE_OF, STOCK, engine_kind
from benchmarks.overhead.processes import EngineProcess
from benchmarks.overhead.rounds import Cell

USABLE = 0.95  # of the device's memory


@dataclass(frozen=True)
class EngineOptions:
    """vLLM's options, the same for every engine but the plugin's.

    Attributes:
        model: The model served.
        cells: What will be measured; sizes everything.
        dtype: As vLLM's option.
        eager: Neither torch.compile nor CUDA graphs.
    """

    model: Model
    cells: Sequence[Cell]
    dtype: str
    eager: bool

    @property
    def kv_bytes(self) -> int:
        """KV cache for the largest batch, and for one sequence as vLLM demands."""
        needs = [cell.size * round_up(cell.length) for cell in self.cells]
        return self.model.kv_bytes(max(*needs, self.max_length), self.dtype)

    @property
    def max_length(self) -> int:
        """Tokens of the longest request, in whole blocks."""
        return max(round_up(cell.length) for cell in self.cells)

    def spec(self, kind: str, engines: int) -> dict[str, Any]:
        """Return what `benchmarks.overhead.engine` takes, `engines` sharing a device.

        CUDA graphs are captured for the measured batches only.
        """
        cells = self.cells
        batches = sorted({cell.size for cell in cells if cell.what == "decode"})
        options = {
            "model": str(self.model.folder),
            "load_format": self.model.load_format,
            "skip_tokenizer_init": True,
            "dtype": self.dtype,
            "seed": 0,
            "max_model_len": self.max_length,
            "max_num_seqs": max(cell.size for cell in cells),
            # every prefill is one step
            "max_num_batched_tokens": max(
                round_up(cell.size * cell.prompt) for cell in cells
            ),
            "enable_prefix_caching": False,
            "gpu_memory_utilization": round(0.9 / engines, 3),
            "kv_cache_memory_bytes": self.kv_bytes,
            "additional_config": engine_kind(kind, self.model.shape).additional_config,
        }
        if self.eager:
            options["enforce_eager"] = True
        else:
            options["compilation_config"] = {"cudagraph_capture_sizes": batches}
        return {"options": options, "plugin": kind != STOCK}


def split(kinds: Sequence[str], engine_bytes: int, total_bytes: int) -> list[list[str]]:
    """Return groups of engines that fit on the device together, stock in each.

    Args:
        kinds: Engines needed; stock is one of them.
        engine_bytes: Memory of one engine.
        total_bytes: Memory of the device.

    Raises:
        ValueError: not even two engines fit.
    """
    fit = int(USABLE * total_bytes / engine_bytes)
    if fit < 2:
        raise ValueError(
            f"two engines of {engine_bytes / 2**30:.1f} GiB do not fit into "
            f"{total_bytes / 2**30:.1f} GiB: a ratio needs stock and plugin at once"
        )
    others = [kind for kind in kinds if kind != STOCK]
    chunks = [others[i : i + fit - 1] for i in range(0, len(others), fit - 1)]
    return [[STOCK, *chunk] for chunk in chunks or [[]]]


def groups(modes: Sequence[str], options: EngineOptions) -> list[list[str]]:
    """Return the groups of engines that the modes need on this device."""
    from vllm.platforms import current_platform

    kinds = list(dict.fromkeys(ENGINE_OF[mode] for mode in modes))
    total = current_platform.get_device_total_memory()
    need = options.model.engine_bytes(options.kv_bytes, options.dtype)
    return split(kinds, need, total)


@contextmanager
def started(
    kinds: Sequence[str], options: EngineOptions, in_turn: bool, logs: Path
) -> Iterator[tuple[dict[str, EngineProcess], dict[str, Any]]]:
    """Run engines; yield them and their facts by kind.

    Args:
        kinds: Which.
        options: For all of them.
        in_turn: Start each after the one before is ready, else all at once.
        logs: Path that the log files' names begin with.
    """
    engines: dict[str, EngineProcess] = {}
    facts: dict[str, Any] = {}
    begin = time.perf_counter()

    def wait(kind: str) -> None:
        facts[kind] = engines[kind].answer()
        if not in_turn and facts[kind]["memory"]:
            # what others took meanwhile is in it
            facts[kind]["memory"]["device"] = None
        seconds = time.perf_counter() - begin
        print(f"engine {kind} is ready after {seconds:.1f} s", flush=True)

    try:
        for kind in kinds:
            log = logs.with_name(f"{logs.stem}-{kind}.log")
            environment = engine_kind(kind, options.model.shape).environment
            spec = options.spec(kind, len(kinds))
            engines[kind] = EngineProcess(spec, environment, log)
            if in_turn:
                wait(kind)
        for kind in [kind for kind in kinds if kind not in facts]:
            wait(kind)
        yield engines, facts
    finally:
        for engine in engines.values():
            engine.stop()
