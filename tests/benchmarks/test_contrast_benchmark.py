# SPDX-License-Identifier: Apache-2.0
"""`benchmarks.contrast`: its arithmetic, and one round on a real engine."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks.contrast import kernel
from benchmarks.contrast.cost import CONTRAST, MODES, PLAIN, summarise
from benchmarks.overhead.processes import ROOT
from tests.benchmarks.test_overhead_benchmark import config_only  # noqa: F401


def sample(number, mode, seconds, pairs=8):
    return {"round": number, "mode": mode, "seconds": seconds, "pairs": pairs}


def test_ratios_are_taken_within_a_round():
    # plain drifts by a factor of 100; the contrast costs 20, 30 and 40 %
    seconds = [(1, 1.0, 1.2), (2, 10.0, 13.0), (3, 100.0, 140.0)]
    samples = [sample(n, mode, t) for n, t, _ in seconds for mode in MODES[:-1]]
    samples += [sample(n, CONTRAST, t) for n, _, t in seconds]
    rows = {row["mode"]: row for row in summarise(samples)}
    assert rows[PLAIN]["ratio"] == 1
    row = rows[CONTRAST]
    assert row["ratio"] == pytest.approx(1.3)
    assert (row["fastest"], row["slowest"]) == (pytest.approx(1.2), pytest.approx(1.4))
    assert (row["seconds"], row["rounds"]) == (13.0, 3)


def test_bytes_of_a_pair():
    assert kernel.must_read(1000, 3, torch.bfloat16) == 3 * 2 * 1000 * 2
    assert kernel.must_read(1000, 3, torch.float32) == 3 * 2 * 1000 * 4
    assert kernel.must_write(1000, 3) == 3 * 1000 * 4


def test_a_round_on_an_engine(config_only, tmp_path):  # noqa: F811
    out = tmp_path / "out.json"
    command = [
        *(sys.executable, "-m", "benchmarks.contrast", "cost"),
        *("--model", str(config_only), "--pairs", "1,2", "--steps", "4"),
        *("--repeat", "2", "--dtype", "float32", "--eager", "--out", str(out)),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (run,) = json.loads(out.read_text())
    assert run["conditions"]["weights"] == "random"
    assert len(run["samples"]) == 2 * 2 * len(MODES)
    assert [(row["pairs"], row["mode"]) for row in run["summary"]] == [
        (pairs, mode) for pairs in (1, 2) for mode in MODES
    ]
    assert all(row["seconds"] > 0 for row in run["summary"])
    assert "contrast" in done.stdout
