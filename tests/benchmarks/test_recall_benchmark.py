# SPDX-License-Identifier: Apache-2.0
"""`benchmarks.remix.recall`: every figure is measured, on a store that is served."""

import pytest
from transformers import AutoConfig

pytest.importorskip("vllm")

from benchmarks.remix.recall import ROWS, look_up, measure, parser, write_store
from moe_tta.remix.tokens import load_tokens


def test_every_row_count_is_measured():
    found = look_up(tokens=30, hidden_size=16, experts=4, repeats=2)
    assert list(found) == [str(rows) for rows in ROWS]
    assert all(0 < part["min"] <= part["median"] for part in found.values())


def test_engines_are_measured_side_by_side(tiny_models, tmp_path):
    folder = tiny_models("mixtral")
    small = ["--tokens", "40", "--requests", "2", "--prompt", "8", "--generated", "3"]
    args = parser().parse_args([folder, "--dtype", "float32", *small, "--repeats", "1"])
    config = AutoConfig.from_pretrained(folder)
    row = measure(args, config, tmp_path)
    assert set(row["seconds"]) == {"stock", "idle", "knn"}
    assert all(ratio > 0 for ratio in row["ratio"].values())
    write_store(args.model, config, args.dtype, 40, tmp_path / "again")
    assert load_tokens(tmp_path / "again").card.counts.tokens == 40
