# SPDX-License-Identifier: Apache-2.0
"""Pure parts of `benchmarks.kernel`: bytes, ratios, tables, and the bit comparison."""

import json
import math

import numpy as np
import pytest
import torch

from benchmarks.kernel.grid import Case, cases, must_read, must_write, plan_bytes
from benchmarks.kernel.report import append_run, judge, mismatch_lines, speed_lines
from moe_tta.plan import RoutingPlan, Select
from tests.kernels.cases import experts, make_plan

BIAS = make_plan(bias=[0.5] * 64)
FULL = make_plan(
    bias=[0.5] * 64,
    promote=experts(64, 1),
    demote=experts(64, 2),
    select=Select.TOP_P,
    k_min=1,
    k_max=8,
    select_args=[0.8, 0, 0],
)


@pytest.mark.parametrize(
    ("plan", "num_bytes"),
    [
        (RoutingPlan(), 0),
        (BIAS, 64 * 4),
        # bias, one byte of flags, then select, k_min, k_max and three numbers
        (FULL, 64 * 4 + 64 + 3 * 4 + 3 * 4),
        (make_plan(seed=1), 8),
        (make_plan(drop=experts(64, 0), scale=[2.0] * 64), 64 + 64 * 4),
    ],
)
def test_plan_bytes(plan, num_bytes):
    assert plan_bytes(plan, 64) == num_bytes


def test_bytes_that_must_move():
    case = Case(tokens=1000, experts=64, top_k=8)
    assert must_read(case) == 1000 * 64 * 2
    assert must_read(case, BIAS, 1) == 1000 * 64 * 2 + 256
    assert must_read(case, FULL, 1000) == 1000 * (64 * 2 + 344)
    assert must_write(case) == 1000 * 8 * (4 + 4)


def test_grids():
    small, full = cases("small"), cases("full")
    assert set(small) < set(full)
    assert len(full) == len(set(full)) == 8 * 5
    assert Case(65536, 512, 10) in full


@pytest.mark.parametrize(("copy", "floor"), [(2.0, 2.0), (0.5, 1.0)])
def test_the_floor_is_the_longer_of_launch_and_copy(copy, floor):
    found = judge(4.0, 8_000_000, copy, 1.0, 5.0)
    assert found["over_floor"] == 4.0 / floor
    assert found["over_stock"] == 0.8
    assert found["bytes_per_s"] == pytest.approx(2e12)
    assert judge(4.0, 1, copy, 1.0, None)["over_stock"] is None


def test_runs_are_appended(tmp_path):
    path = tmp_path / "new" / "runs.json"
    rows = [{"tokens": 1, "variants": {"slot 0": judge(1.5, 20, 1.0, 1.0, None)}}]
    for device in ("first", "second"):
        append_run(path, {"conditions": {"device": device}, "rows": rows})
    runs = json.loads(path.read_text())
    assert [run["conditions"]["device"] for run in runs] == ["first", "second"]
    assert runs[1]["rows"] == rows


def test_speed_table():
    row = Case(7, 64, 8)._asdict() | {
        "cold": True,
        "variants": {"slot 0": judge(3, 6000, 2, 1.5, 4), "a": judge(3, 1, 2, 1, None)},
    }
    head, *lines = (line.split() for line in speed_lines([row]))
    assert head[0] == "T"
    cells = "7 64 8 slot 0 3.00 1.50 2.00 2.0 1.50 0.75 yes"
    assert lines[0] == cells.split()
    assert lines[1][-2] == "-"


def routing(weights, ids):
    from moe_tta.kernels.reference import Routing

    return Routing(torch.tensor(weights), torch.tensor(ids, dtype=torch.int32))


def test_rows_are_compared_bit_by_bit():
    stock = pytest.importorskip("benchmarks.kernel.stock", exc_type=ImportError)
    up = float(np.nextafter(np.float32(0.5), np.float32(1)))
    ids = [[0, 1]] * 4
    theirs = routing([[0.5, 0.5], [0.5, 0.0], [math.nan, 0.5], [0.5, 0.5]], ids)
    same = routing([[0.5, 0.5], [0.5, 0.0], [-math.nan, 0.5], [0.5, 0.5]], ids)
    assert stock.differing_rows(same, theirs) == (0, 0)
    ours = [[0.5, up], [0.5, -0.0], [0.5, 0.5], [0.5, 0.5]]
    other = routing(ours, [[0, 1], [0, 1], [0, 1], [1, 0]])
    assert stock.differing_rows(other, theirs) == (1, 3)
    finding = stock.Finding(4, 2, 2, "bfloat16", True, "normal", 1, 3)
    lines = mismatch_lines([finding, finding._replace(tokens=6, ids=0)])
    assert lines[1].split()[-3:] == ["1/6", "of", "10"]


def test_kinds_of_rows():
    stock = pytest.importorskip("benchmarks.kernel.stock", exc_type=ImportError)
    rows = {
        kind: stock.draw_rows(kind, 64, 60, torch.float32, "cpu") for kind in stock.ROWS
    }
    assert len(rows["ties"][0].unique()) < 60
    assert (rows["equal"] == rows["equal"][:, :1]).all()
    assert rows["huge"].abs().max() > 80
    assert rows["masked"].isneginf().any()
    assert rows["masked"].isfinite().any(dim=1).all()
    assert rows["nan"].isnan().any(dim=1).all()
    assert (~rows["infinite"].isfinite()).any(dim=1).all()
