# SPDX-License-Identifier: Apache-2.0
"""Engines on the path of GPUs, the kernel interpreted, give what the CPU's gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize(("name", "k_max"), [("mixtral", 4), ("glm4_moe", 4)])
def test_gpu_path_equals_cpu_path(tiny_models, tmp_path, name, k_max):
    out = tmp_path / "out.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.plugin.gpu_path"),
            *(tiny_models(name), str(k_max), str(out)),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (kind, theirs), (plain, ours) = json.loads(out.read_text())
    assert (kind, plain) == ("GpuLayerRouting", "LayerRouting")
    assert [tokens for tokens, _ in theirs] == [tokens for tokens, _ in ours]
    for (_, got), (_, want) in zip(theirs, ours, strict=True):
        # the kernel's weights are a few float32 roundings from the law's
        assert got == pytest.approx(want, abs=1e-4)


def test_every_row_obeys_its_own_request(tiny_models, tmp_path):
    out = tmp_path / "out.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.plugin.gpu_audit"),
            *(tiny_models("mixtral"), str(out)),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    sound, mixed_up = json.loads(out.read_text())
    assert sound["layers"] == 4
    assert min(sound[n] for n in ("finished", "chunks", "preemptions")) > 0, sound
    assert sound["planned_rows"] > sound["rows"] / 4
    assert sound["wrong"] == 0
    assert mixed_up["wrong"] > 0
