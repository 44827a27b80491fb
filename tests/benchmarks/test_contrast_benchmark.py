# SPDX-License-Identifier: Apache-2.0
"""`benchmarks.contrast`: its arithmetic, and one round on a real engine."""

import json
import subprocess
import sys
from types import SimpleNamespace

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


@pytest.mark.parametrize(("able", "both"), [(True, [False, True]), (False, [False])])
def test_both_ways_to_launch_stand_beside_one_floor(monkeypatch, able, both):
    class Rows:
        def __init__(self, pairs, vocab, device, overlap):
            self.overlap = overlap

    timed = {"copy": 4.0, "empty": 1.0, False: 8.0, True: 6.0}
    gpu = SimpleNamespace(L2_cache_size=1)
    fakes = {
        "can_overlap": lambda device: able,
        "ContrastRows": Rows,
        "combination": lambda combine, *case: combine.overlap,
        "copy": lambda read, written: "copy",
        "partial": lambda *call: "empty",
        "median_us": lambda launches: timed[launches[0]],
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(kernel, name, fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: None)
    rows = kernel.measure(1000, 2, torch.float32, True)
    assert [row["overlap"] for row in rows] == both
    assert [row["over_floor"] for row in rows] == [2.0, 1.5][: len(both)]
    assert {row["copy_us"] for row in rows} == {4.0}
    assert len({len(line) for line in kernel.lines(rows)}) == 1


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
