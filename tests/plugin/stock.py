# SPDX-License-Identifier: Apache-2.0
"""Run an engine in a process of its own and print what it generated, as JSON.

`python -m tests.plugin.stock MODEL JOB.json`; with MOE_TTA_DISABLE=1 it is stock vLLM.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.plugin.engine import generate, make_engine


def run_stock(model, prompts, sampling, tmp_path, engine=None):
    """Return what stock vLLM generates: [(token_ids, logprobs), ...]."""
    job = Path(tmp_path) / "job.json"
    out = Path(tmp_path) / "out.json"
    job.write_text(
        json.dumps({"prompts": prompts, "sampling": sampling, "engine": engine or {}})
    )
    subprocess.run(
        [sys.executable, "-m", "tests.plugin.stock", model, job, out],
        check=True,
        env={**os.environ, "MOE_TTA_DISABLE": "1"},
        cwd=Path(__file__).parents[2],
    )
    return [tuple(row) for row in json.loads(out.read_text())]


def main(model, job, out):
    job = json.loads(Path(job).read_text())
    llm = make_engine(model, **job["engine"])
    assert not hasattr(llm.llm_engine.input_processor, "moe_tta")
    rows = generate(llm, job["prompts"], [job["sampling"]] * len(job["prompts"]))
    Path(out).write_text(json.dumps(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
