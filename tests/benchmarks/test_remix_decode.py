# SPDX-License-Identifier: Apache-2.0
"""`benchmarks.remix.decode`: batches with remix say what plain ones do."""

from pathlib import Path

import pytest

pytest.importorskip("faiss")
pytest.importorskip("vllm")

from benchmarks.remix.decode import MODES, measure, parser
from moe_tta.vllm_plugin.rows import StepRows


def test_modes_differ_by_their_plans_alone(tiny_models, tmp_path, monkeypatch):
    planned, fill = [], StepRows._fill

    def counted(rows, runs, slots):
        planned.append(len(runs))
        return fill(rows, runs, slots)

    monkeypatch.setattr(StepRows, "_fill", counted)
    words = f"{tiny_models('mixtral')} --dtype float32 --rows 100 --requests 2 "
    words += "--prompt 4 --generated 6 --rounds 2"
    row = measure(parser().parse_args(words.split()), Path(tmp_path))
    assert set(row["ratios"]) == set(MODES)
    for mode, ratio in row["ratios"].items():
        assert ratio["same_texts"] == 2, mode
        assert len(row["step_s"][mode]) == 2
        assert all(seconds > 0 for seconds in row["step_s"][mode])
    # one batch of each round has plans, in the step that reads its prompts' last rows
    assert planned == [2, 2, 2]
