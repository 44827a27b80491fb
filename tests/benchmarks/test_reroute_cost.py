# SPDX-License-Identifier: Apache-2.0
"""`benchmarks.reroute.cost`: its arithmetic, its requests, a round on a real engine."""

import json
import subprocess
import sys

import pytest

from benchmarks.overhead.processes import ROOT
from benchmarks.reroute.cost import HALVES, WHOLE, ask, modes_of, summarise


def sample(number, mode, seconds):
    gaps = {name: seconds * factor for name, factor in (("p50", 1), ("p99", 2))}
    found = {"batch": 8, "mode": mode, "round": number, "seconds": seconds}
    return {**found, **gaps, "longest": 3 * seconds}


def test_ratios_are_taken_within_a_round():
    # the machine drifts by a factor of 100; rerouting costs 20, 30 and 40 %
    samples = []
    for number, base in ((1, 1.0), (2, 10.0), (3, 100.0)):
        samples += [sample(number, mode, base) for mode in WHOLE + HALVES]
        samples[-1] = sample(number, HALVES[-1], base * (1.1 + number / 10))
        samples[3] = sample(number, WHOLE[3], base)
    rows = {(row["mode"], row["measure"]): row for row in summarise(samples)}
    assert rows["plain", "seconds"]["ratio"] == 1
    for measure in ("p50", "p99", "longest"):
        row = rows[HALVES[-1], measure]
        assert row["ratio"] == pytest.approx(1.3)
        assert row["fastest"] == pytest.approx(1.2)
        assert row["slowest"] == pytest.approx(1.4)
        assert row["rounds"] == 3
    assert rows[HALVES[-1], "p99"]["seconds"] == pytest.approx(26)
    assert ("alone", "seconds") not in rows


def test_who_reroutes():
    prompts = [[n] for n in range(4)]
    settings = {"every": 128, "steps": 5}

    def modes(mode):
        return [
            (one.prompt[0], one.request and one.request["reroute"]["mode"])
            for one in ask(prompts, mode, settings)
        ]

    nobody = [(n, None) for n in range(4)]
    assert modes("plain") == modes("plain-again") == nobody
    assert modes("wait") == [(n, "wait") for n in range(4)]
    assert modes("overlap") == [(n, "overlap") for n in range(4)]
    assert modes("alone") == [(0, None), (2, None)]
    beside = [(0, None), (1, "wait"), (2, None), (3, "wait")]
    assert modes("beside-wait") == beside
    assert set(modes_of(1)).isdisjoint(HALVES)


def test_a_round_on_an_engine(tiny_models, tmp_path):
    out = tmp_path / "out.json"
    command = [
        *(sys.executable, "-m", "benchmarks.reroute.cost"),
        *("--model", tiny_models("mixtral"), "--batch", "1,2", "--tokens", "24"),
        *("--every", "8", "--steps", "1", "--repeat", "1", "--dtype", "float32"),
        *("--batch-tokens", "1000"),
        *("--eager", "--out", str(out)),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (run,) = json.loads(out.read_text())
    assert run["conditions"]["flags"]["adapter_budget"] == 2048
    assert len(run["samples"]) == len(WHOLE) + len(WHOLE + HALVES)
    rounds = {(s["batch"], s["mode"]): s["outcomes"] for s in run["samples"]}
    assert rounds[2, "plain"] == rounds[2, "alone"] == {}
    assert rounds[1, "wait"] == {"adapted": 3}
    assert rounds[2, "wait"] == {"adapted": 6}
    assert rounds[2, "beside-wait"] == {"adapted": 3}
    assert rounds[2, "overlap"]["adapted"] > 1
    for one in run["samples"]:
        assert one["seconds"] > 0
        assert (one["adapter_seconds"] > 0) == bool(one["outcomes"])
        assert ("p99" in one) == (one["mode"] in HALVES)
    assert "beside-overlap" in done.stdout
