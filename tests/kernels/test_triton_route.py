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


@pytest.mark.parametrize(
    "cases",
    ["triton_cases.py", "triton_options.py", "triton_random.py", "triton_sum.py"],
)
def test_triton_kernel_equals_the_law(cases):
    env = dict(os.environ, OMP_NUM_THREADS="1")
    env.pop("TRITON_INTERPRET", None)
    if not torch.cuda.is_available():
        env["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, f"tests/kernels/{cases}"],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
