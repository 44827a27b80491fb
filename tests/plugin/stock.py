# SPDX-License-Identifier: Apache-2.0
"""Run engines in a process of its own and write what they generated, as JSON.

`python -m tests.plugin.stock JOB OUT`; with MOE_TTA_DISABLE=1 it is stock vLLM.
"""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

from tests.plugin.engine import engine, generate


def run_stock(model, prompts, sampling, tmp_path, engine=None):
    """Return what stock vLLM generates: [(token_ids, logprobs), ...]."""
    return run_stocks([model], prompts, sampling, tmp_path, engine)[0]


def run_stocks(models, prompts, sampling, tmp_path, engine=None):
    """Return what stock vLLM generates with each model, one engine after the other.

    Where it cannot run a model, its traceback stands instead.
    """
    job = Path(tmp_path) / "job.json"
    out = Path(tmp_path) / "out.json"
    fields = {"models": models, "prompts": prompts, "sampling": sampling}
    job.write_text(json.dumps({**fields, "engine": engine or {}}))
    subprocess.run(
        [sys.executable, "-m", "tests.plugin.stock", job, out],
        check=True,
        env={**os.environ, "MOE_TTA_DISABLE": "1"},
        cwd=Path(__file__).parents[2],
    )
    found = json.loads(out.read_text())
    return [rows if isinstance(rows, str) else list(map(tuple, rows)) for rows in found]


def _generated(model, job, params):
    with engine(model, **job["engine"]) as llm:
        assert not hasattr(llm.llm_engine.input_processor, "moe_tta")
        return generate(llm, job["prompts"], params)


def main(job, out):
    job = json.loads(Path(job).read_text())
    params = [job["sampling"]] * len(job["prompts"])
    found = []
    for model in job["models"]:
        try:
            found.append(_generated(model, job, params))
        except Exception:
            found.append(traceback.format_exc())
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
