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
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from moe_tta.vllm_plugin.verify_checks import Subject

CHECKS = ("armed", "fires", "neutral", "isolated", "prefix-cache", "clean")

Dtype = Literal["auto", "float32", "bfloat16"]

LOG_LINES = 12
MAX_MODEL_LEN = 384

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
        exact: Whether outputs must not depend on the batch: float32 on CPU,
            vLLM's batch-invariant mode elsewhere.
        stock: Whether vLLM runs without the plugin.
        checks: What to ask of it.
    """

    model: str
    dtype: Dtype
    exact: bool
    stock: bool
    checks: tuple[str, ...]


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
    report, outputs = Report(model), {}
    with tempfile.TemporaryDirectory(prefix="moe-tta-verify-") as folder:
        for number, job in enumerate(_jobs(model, dtype, only)):
            progress(f"{_title(job)}: {', '.join(job.checks)} ...")
            lines, crash = _run(job, Path(folder), number)
            report.refused = next((x["refused"] for x in lines if "refused" in x), None)
            if report.refused is not None:
                return report
            report.rows += [Row(**line["row"]) for line in lines if "row" in line]
            outputs |= {job.stock: x["outputs"] for x in lines if "outputs" in x}
            report.rows += _not_shown(job, lines, crash)
    if len(outputs) == 2:
        report.rows.append(_compare(outputs[False], outputs[True], dtype))
    report.rows.sort(key=lambda row: CHECKS.index(row.check))
    return report


def _jobs(model: str, dtype: Dtype, only: Collection[str]) -> Iterator[Job]:
    """Yield as few engines as the checks need, the plugin's first."""
    exact = dtype == "float32"
    main = [c for c in CHECKS if c in only and (exact or c != "isolated")]
    if set(main) - {"clean"} or (main and "isolated" not in only):
        yield Job(model, dtype, exact, False, tuple(main))
    if "isolated" in only and not exact:
        last = [c for c in ("isolated", "clean") if c in only]
        yield Job(model, dtype, True, False, tuple(last))
    if "neutral" in only:
        yield Job(model, dtype, exact, True, ("neutral",))


def _title(job: Job) -> str:
    dtype = "exact" if job.exact else job.dtype
    return f"{'stock vLLM' if job.stock else 'plugin'} ({dtype})"


def _run(job: Job, folder: Path, number: int) -> tuple[list[dict[str, Any]], str]:
    """Return the job's result lines, and how it ended if not well."""
    paths = [folder / f"{number}.{part}" for part in ("job", "results", "log")]
    paths[0].write_text(json.dumps({**asdict(job), "traces": str(folder / "traces")}))
    paths[1].touch()
    switch = {"MOE_TTA_DISABLE": "1" if job.stock else "0"}
    command = [sys.executable, "-m", "moe_tta.vllm_plugin.verify", *paths[:2]]
    with paths[2].open("wb") as log:
        done = subprocess.run(
            command,
            env={**_UNLESS_SET, **os.environ, **_ALWAYS, **switch},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    lines = [json.loads(line) for line in paths[1].read_text().splitlines()]
    if done.returncode == 0:
        return lines, ""
    log_lines = paths[2].read_text(errors="replace").splitlines()
    tail = "\n".join(log_lines[-LOG_LINES:])
    return lines, f"the engine ended with exit code {done.returncode}:\n{tail}"


def _not_shown(job: Job, lines: list[dict[str, Any]], crash: str) -> list[Row]:
    """Return a red row for each check that the job did not come to."""
    shown = {line["row"]["check"] for line in lines if "row" in line}
    shown |= {"neutral" for line in lines if "outputs" in line}
    missing = [check for check in job.checks if check not in shown]
    return [Row(check, _title(job), False, crash) for check in missing]


def _compare(ours: dict[str, list], stock: dict[str, list], dtype: Dtype) -> Row:
    """Judge the neutral requests by what stock vLLM generated."""
    want = stock["plain"]
    differing = {
        form: sum(a != b for a, b in zip(got, want, strict=True))
        for form, got in ours.items()
    }
    if bad := [f"{form} {n}" for form, n in differing.items() if n]:
        words = f"requests of {len(want)} that differ from stock: {', '.join(bad)}"
        return Row("neutral", f"plugin vs stock ({dtype})", False, words)
    words = (
        f"{', '.join(ours)}: {len(want)} prompts each, tokens and top-5 logprobs equal "
        "stock vLLM's"
    )
    return Row("neutral", f"plugin vs stock ({dtype})", True, words)


def main(job_file: str, results_file: str) -> int:
    """Run one job in this process, and return its exit code."""
    job = json.loads(Path(job_file).read_text())
    with Path(results_file).open("a", buffering=1) as results:

        def tell(line: dict[str, Any]) -> None:
            results.write(json.dumps(line) + "\n")

        from moe_tta.vllm_plugin.model_shape import UnsupportedModelError

        try:
            _work(job, tell)
        except UnsupportedModelError as err:
            tell({"refused": str(err)})
    return 0


def _work(job: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> None:
    from moe_tta.vllm_plugin.verify_checks import CHECKS as ASK
    from moe_tta.vllm_plugin.verify_checks import CheckFailed, neutral

    subject = _start(job)
    engine = str(subject.llm.llm_engine.model_config.dtype).removeprefix("torch.")
    for check in job["checks"]:
        start = time.monotonic()
        if check == "neutral":
            tell({"outputs": neutral(subject, job["stock"])})
            continue
        try:
            ok, evidence = True, ASK[check](subject)
        except CheckFailed as err:
            ok, evidence = False, str(err)
        seconds = round(time.monotonic() - start, 1)
        tell({"row": asdict(Row(check, f"plugin ({engine})", ok, evidence, seconds))})


def _start(job: dict[str, Any]) -> Subject:
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    dtype = "float32" if job["exact"] and on_cpu else job["dtype"]
    if job["exact"] and not on_cpu:
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
    traced = on_cpu and "fires" in job["checks"]
    from vllm import LLM

    from moe_tta.vllm_plugin.model_shape import UnsupportedModelError
    from moe_tta.vllm_plugin.verify_checks import Subject

    llm = LLM(
        model=job["model"],
        dtype=dtype,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=16,
        enforce_eager=True,
        enable_prefix_caching=True,
        skip_tokenizer_init=True,
        seed=0,
        additional_config={"moe_tta": {"trace_dir": job["traces"]}} if traced else {},
    )
    admission = getattr(llm.llm_engine.input_processor, "moe_tta", None)
    if job["stock"]:
        assert admission is None, "MOE_TTA_DISABLE=1 left the plugin on"
    elif admission is None:
        raise RuntimeError("vLLM did not load the plugin; see moe-tta doctor")
    elif admission.shape is None:
        raise UnsupportedModelError("this model has no MoE layers to route")
    return Subject(llm, Path(job["traces"]) if traced else None)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
