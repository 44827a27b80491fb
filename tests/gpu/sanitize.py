# SPDX-License-Identifier: Apache-2.0
"""Runs the kernels on a few dozen shapes, for NVIDIA's compute-sanitizer.

From the repository root, for TOOL in memcheck, initcheck and racecheck:

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --tool TOOL --error-exitcode 1 python -m tests.gpu.sanitize

Without PyTorch's cache every tensor is an allocation of its own size, so an access
one element beyond it is seen. Nothing is compared here: `test_route_kernel.py` does
that. Numbers behind the command are the worlds of `random_plans.py` to run, all of
them by default; each is one compilation or two, which is what takes the time.
"""

import sys

import torch

from moe_tta.kernels import route
from moe_tta.kernels.contrast_triton import ContrastRows
from moe_tta.kernels.used_sum import MANY_TOKENS, sum_used_columns
from tests.kernels.random_plans import WORLDS, draw, draw_rows

PLANS = 12
ROWS = (1, 33)
TILED = 4 * 33 + 1  # rows of the model's own, the last tile short


def route_rows(index):
    """Rows with plans one by one, and rows without plans in tiles where they fit."""
    world = draw(index, PLANS, "cuda")
    for num_rows in ROWS:
        world.kernel(*draw_rows(world, num_rows))
        torch.cuda.synchronize()
    rows = draw_rows(world, TILED)
    rows.slots.zero_()
    many, route.MANY_ROWS = route.MANY_ROWS, 1
    world.kernel(*rows)
    torch.cuda.synchronize()
    route.MANY_ROWS = many


def sum_columns():
    """Columns of experts' outputs, every third one unused."""
    for tokens, width, hidden in ((3, 2, 96), (5, 8, 1030), (MANY_TOKENS, 2, 64)):
        ids = torch.arange(tokens * width, device="cuda", dtype=torch.int32) % 3 - 1
        outputs = torch.randn(tokens, width, hidden, device="cuda")
        total = torch.empty(tokens, hidden, device="cuda")
        sum_used_columns(outputs, total, ids.reshape(tokens, width))
        torch.cuda.synchronize()


def contrast():
    """Two pairs of rows, a short last chunk."""
    logits = torch.randn(4, 9001, device="cuda")
    leads = torch.tensor([2, 0], device="cuda")
    half = torch.full((2,), 0.5, device="cuda")
    combine = ContrastRows(2, 9001, "cuda")
    combine(logits, logits, leads, leads + 1, half, half)
    torch.cuda.synchronize()


def main(worlds):
    for index in worlds:
        route_rows(index)
    sum_columns()
    contrast()
    print(f"{len(worlds)} worlds, the sum and the contrast ran")  # noqa: T201


if __name__ == "__main__":
    main([int(index) for index in sys.argv[1:]] or list(WORLDS))
