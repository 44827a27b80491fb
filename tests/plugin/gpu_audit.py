# SPDX-License-Identifier: Apache-2.0
"""The audit over an engine on the path of GPUs, and over one whose rows are mixed up.

`python -m tests.plugin.gpu_audit MODEL OUT`, with TRITON_INTERPRET=1 on a CPU.
"""

import json
import random
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import numpy as np

from moe_tta.vllm_plugin import gpu_router, rows
from tests.plugin.audit import JOB, Audit, Recorder
from tests.plugin.engine import engine
from tests.plugin.test_isolation import Job, counters, draw_jobs, drive

CPU_OPTIONS = {
    "dtype": "float32",
    "max_model_len": 160,
    "block_size": 32,
    "max_num_seqs": 6,
    "max_num_batched_tokens": 32,
    "num_gpu_blocks_override": 6,
}


def roll_slots():
    """Make every fifth step obey its neighbours' slots."""
    original, steps = rows.StepRows._fill, iter(range(10**9))

    def spoiled(self, runs, slots):
        original(self, runs, slots)
        if next(steps) % 5 == 0:
            end = runs[-1][1]
            self._slots[:end] = np.roll(self._slots[:end], 1)

    return mock.patch.object(rows.StepRows, "_fill", spoiled)


def audited(model, count, tokens, options, spoil=False):
    """Drive random jobs; return what the audit counted."""
    rng, found = random.Random(31), Recorder()
    with ExitStack() as stack:
        stack.enter_context(found.recording())
        llm = stack.enter_context(engine(model, **options))
        shape = llm.llm_engine.input_processor.moe_tta.shape
        jobs = [
            _numbered(job, i, tokens)
            for i, job in enumerate(draw_jobs(rng, shape, count))
        ]
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        requests, lens = [job.request for job in jobs], [len(j.prompt) for j in jobs]
        audit = Audit(runner, shape, requests, lens, found)
        if spoil:
            stack.enter_context(roll_slots())
        results, aborted = drive(llm, jobs, rng)
        counted = counters(llm)
    return {
        "finished": len(results),
        "aborted": len(aborted),
        "layers": len(audit.armed),
        "rows": audit.rows,
        "planned_rows": audit.planned_rows,
        "chunks": audit.chunks,
        "preemptions": counted["vllm:num_preemptions"],
        "prefix_hits": counted["vllm:prefix_cache_hits"],
        "wrong": int(audit.wrong),
    }


def _numbered(job: Job, index: int, tokens: int) -> Job:
    params = job.params.clone()
    params.extra_args = {**(params.extra_args or {}), JOB: index}
    params.max_tokens = tokens
    return job._replace(params=params)


def main(model, out):
    original = rows.StepRows.__init__

    def pretend(self, *args):
        original(self, *args)
        self.on_cpu = False

    with (
        mock.patch.object(rows.StepRows, "__init__", pretend),
        mock.patch.object(gpu_router, "let_experts_skip", return_value=False),
    ):
        found = [
            audited(model, 8, 12, CPU_OPTIONS),
            audited(model, 4, 4, CPU_OPTIONS, spoil=True),
        ]
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
