# SPDX-License-Identifier: Apache-2.0
"""Runs Triton cases in a process of their own: interpreted where there is no GPU.

Triton chooses to interpret when it is imported, and other tests may have imported it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


CASES = (
    "kernels/triton_cases.py",
    "kernels/triton_options.py",
    "kernels/triton_random.py",
    "kernels/triton_sum.py",
    "kernels/triton_contrast.py",
    "kernels/triton_recall.py",
    "kernels/triton_experts.py",
    "kernels/triton_topk.py",
    "adapter/triton_fused.py",
    "kernels/triton_rope.py",
    "kernels/triton_take_rows.py",
    "kernels/triton_token_loss.py",
)


@pytest.mark.parametrize("cases", CASES)
def test_triton_kernels_equal_plain_torch(cases):
    env = dict(os.environ, OMP_NUM_THREADS="1")
    env.pop("TRITON_INTERPRET", None)
    if not torch.cuda.is_available():
        env["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, f"tests/{cases}"],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
