# SPDX-License-Identifier: Apache-2.0
"""`benchmarks.admission`: new requests are new, and every cell is measured."""

import itertools
import json

import pytest

pytest.importorskip("vllm")

from benchmarks.admission.__main__ import REQUESTS, SHAPES, bodies, measure
from moe_tta import RouterShape

SHAPE = RouterShape(
    layers=(0, 1), num_hidden_layers=2, num_experts=64, top_k=8, k_max=8
)


@pytest.mark.parametrize("members", [m for m in REQUESTS.values() if m])
def test_new_requests_differ(members):
    drawn = itertools.islice(bodies(SHAPE, members), 1500)
    texts = [json.dumps(body) for body in drawn]
    assert len(set(texts)) == len(texts)
    for member in ("promote", "demote", "bias", "p"):
        assert (f'"{member}"' in texts[0]) is (member in members)


def test_every_cell_is_measured():
    rows = measure(samples=2)
    assert len(rows) == len(SHAPES) * len(REQUESTS) * 4
    assert all(0 < row["min_us"] <= row["median_us"] for row in rows)
