# SPDX-License-Identifier: Apache-2.0
"""`moe-tta verify`: real engines on a model, each in a process of its own.

`verify` starts them and judges; `python -m moe_tta.vllm_plugin.verify JOB RESULTS` is
one such process. It appends a JSON line per result, so that a crash loses only what
had not been shown yet.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

CHECKS = (
    "armed",
    "fires",
    "neutral",
    "isolated",
    "contrast",
    "prefix-cache",
    "clean",
)
EXACT = ("isolated", "contrast")  # they compare requests whose neighbours differ

Dtype = Literal["auto", "float32", "bfloat16"]

LOG_LINES = 12

_ALWAYS = {
    # one process: a crash is this process's exit code, not a hang
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # stock vLLM on CPU is bit-exact across batching only so, and in float32
    "VLLM_CPU_ATTN_SPLIT_KV": "0",
    # the working directory may hold folders named like packages
    "PYTHONSAFEPATH": "1",
}
_UNLESS_SET = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}


@dataclass(frozen=True)
class Row:
    """The result of one check."""

    check: str
    engine: str
    ok: bool
    evidence: str
    seconds: float = 0.0


@dataclass(frozen=True)
class Job:
    """One engine to start.

    Attributes:
        model: Folder or name of the model.
        dtype: As vLLM's `dtype`.
        exact: Whether a row must not depend on how others are routed: float32 on CPU.
        stock: Whether vLLM runs without the plugin.
        checks: What to ask of it.
    """

    model: str
    dtype: Dtype
    exact: bool
    stock: bool
    checks: tuple[str, ...]

    @property
    def title(self) -> str:
        """How progress and rows of an engine that did not start name it."""
        dtype = "exact" if self.exact else self.dtype
        return f"{'stock' if self.stock else 'plugin'} ({dtype})"


@dataclass
class Report:
    """What `verify` found; `refused` is the plugin's reason not to serve the model."""

    model: str
    rows: list[Row] = field(default_factory=list)
    refused: str | None = None

    @property
    def ok(self) -> bool:
        """Whether every check is green."""
        return self.refused is None and all(row.ok for row in self.rows)

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {**asdict(self), "ok": self.ok}


def verify(
    model: str,
    dtype: Dtype = "auto",
    only: Collection[str] = CHECKS,
    progress: Callable[[str], None] = lambda line: None,
) -> Report:
    """Run the checks on real engines.

    Args:
        model: Folder or name of a model, as vLLM takes it.
        dtype: The engines' dtype; isolation on CPU always runs in float32.
        only: Names from `CHECKS`.
        progress: Takes a line per engine started.
    """
    report, outputs = Report(model), []
    with tempfile.TemporaryDirectory(prefix="moe-tta-verify-") as folder:
        for number, job in enumerate(_jobs(model, dtype, only)):
            progress(f"{job.title}: {', '.join(job.checks)} ...")
            lines, crash = _run(job, Path(folder), number)
            report.refused = next((x["refused"] for x in lines if "refused" in x), None)
            if report.refused is not None:
                return report
            report.rows += [Row(**line["row"]) for line in lines if "row" in line]
            outputs += [line for line in lines if "outputs" in line]
            report.rows += _not_shown(job, lines, crash)
    if len(outputs) == 2:
        report.rows.append(_compare(*outputs))
    report.rows.sort(key=lambda row: CHECKS.index(row.check))
    return report


def check_path(model: str) -> None:
    """Refuse what is a path without a model; other names are for vLLM to find.

    Raises:
        ValueError: says what is missing.
    """
    path = Path(model)
    if not path.exists() and (path.is_absolute() or model.startswith(".")):
        raise ValueError(f"there is no file or folder {model}")
    configs = "config.json", "params.json"
    if path.is_dir() and not any((path / name).exists() for name in configs):
        raise ValueError(f"expected a model's folder, got {model} without config.json")


def _jobs(model: str, dtype: Dtype, only: Collection[str]) -> Iterator[Job]:
    """Yield as few engines as the checks need, the plugin's first."""
    exact = dtype == "float32"
    main = [check for check in CHECKS if check in only]
    last = [] if exact else [check for check in main if check in EXACT]
    main = [check for check in main if check not in last]
    if main:
        yield Job(model, dtype, exact, False, tuple(main))
    if last:
        clean = ["clean"] if "clean" in only else []
        yield Job(model, dtype, True, False, (*last, *clean))
    if "neutral" in only:
        yield Job(model, dtype, exact, True, ("neutral",))


def _run(job: Job, folder: Path, number: int) -> tuple[list[dict[str, Any]], str]:
    """Return the job's result lines, and how it ended if not well."""
    paths = [folder / f"{number}.{part}" for part in ("job", "results", "log")]
    paths[0].write_text(json.dumps(asdict(job)))
    paths[1].touch()
    switch = {"MOE_TTA_DISABLE": "1" if job.stock else "0"}
    with paths[2].open("wb") as log:
        done = subprocess.run(
            [sys.executable, "-m", "moe_tta.vllm_plugin.verify", *paths[:2]],
            env={**_UNLESS_SET, **os.environ, **_ALWAYS, **switch},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    lines = [json.loads(line) for line in paths[1].read_text().splitlines()]
    if done.returncode == 0:
        return lines, ""
    tail = paths[2].read_text(errors="replace").splitlines()[-LOG_LINES:]
    return lines, "\n".join([f"exit code {done.returncode}, its last lines:", *tail])


def _not_shown(job: Job, lines: list[dict[str, Any]], crash: str) -> list[Row]:
    """Return a red row for each check that a crashed engine did not come to."""
    shown = {line["row"]["check"] for line in lines if "row" in line}
    shown |= {"neutral" for line in lines if "outputs" in line}
    missing = [check for check in job.checks if check not in shown]
    words = [f"the engine ended with {crash}"] + ["not run"] * len(missing)
    return [
        Row(check, job.title, False, evidence)
        for check, evidence in zip(missing, words, strict=False)
    ]


def _compare(ours: dict[str, Any], stock: dict[str, Any]) -> Row:
    """Judge the neutral requests by what stock vLLM generated."""
    forms, want = ours["outputs"], stock["outputs"]["plain"]
    differing = {
        form: sum(a != b for a, b in zip(got, want, strict=True))
        for form, got in forms.items()
    }
    if bad := [f"{form}: {n}" for form, n in differing.items() if n]:
        evidence = f"of {len(want)} requests, differ from stock: {', '.join(bad)}"
    else:
        evidence = (
            f"{', '.join(forms)}: {len(want)} requests each, tokens and top-5 logprobs "
            "equal stock vLLM's"
        )
    seconds = round(ours["seconds"] + stock["seconds"], 1)
    return Row("neutral", ours["engine"], not bad, evidence, seconds)


def main(job_file: str, results_file: str) -> int:
    """Run one job in this process, and return its exit code."""
    from moe_tta.vllm_plugin.model_shape import UnsupportedModelError

    job = Job(**json.loads(Path(job_file).read_text()))
    with Path(results_file).open("a", buffering=1) as results:

        def tell(line: dict[str, Any]) -> None:
            results.write(json.dumps(line) + "\n")

        try:
            traces = Path(job_file).with_suffix(".traces")
            _work(job, traces if "fires" in job.checks else None, tell)
        except UnsupportedModelError as err:
            tell({"refused": str(err)})
    return 0


def _work(
    job: Job, traces: Path | None, tell: Callable[[dict[str, Any]], None]
) -> None:
    from moe_tta.vllm_plugin import verify_checks, verify_engine

    subject = verify_engine.start_engine(
        job.model, job.dtype, job.exact, job.stock, traces
    )
    engine = f"plugin ({subject.dtype})"
    for check in job.checks:
        start = time.monotonic()
        if check == "neutral":
            outputs = verify_checks.neutral(subject, job.stock)
            seconds = time.monotonic() - start
            tell({"outputs": outputs, "engine": engine, "seconds": seconds})
            continue
        try:
            ok, evidence = True, verify_checks.CHECKS[check](subject)
        except verify_engine.CheckFailed as err:
            ok, evidence = False, str(err)
        seconds = round(time.monotonic() - start, 1)
        tell({"row": asdict(Row(check, engine, ok, evidence, seconds))})


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
