# SPDX-License-Identifier: Apache-2.0
"""knn on the path of GPU engines, the kernel interpreted, equals the CPU's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_tta.adapter.assignments import TokenDescent
from moe_tta.remix.tokens_build import TokenOptions, build_tokens
from tests.remix.test_knn_served import TEXTS
from tests.remix.tokens import reference_model, write_labelled


@pytest.fixture(scope="module")
def store(tiny_models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    model = reference_model(tiny_models("mixtral"))
    data = write_labelled(folder / "data.jsonl", TEXTS)
    descent = TokenDescent(steps=2, lr=0.5)
    return build_tokens(model, data, folder / "store", TokenOptions("text", descent))


def test_gpu_path_equals_cpu_path(tiny_models, store, tmp_path):
    pytest.importorskip("triton")
    out = tmp_path / "out.json"
    module = (sys.executable, "-m", "tests.plugin.gpu_path")
    done = subprocess.run(
        [*module, tiny_models("mixtral"), "4", str(out), str(store.path)],
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
