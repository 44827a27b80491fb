# SPDX-License-Identifier: Apache-2.0
"""Runs the routing kernel on a few dozen shapes, for NVIDIA's compute-sanitizer.

From the repository root, for TOOL in memcheck, initcheck and racecheck:

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --tool TOOL --error-exitcode 1 python -m tests.gpu.sanitize

Without PyTorch's cache every tensor is an allocation of its own size, so an access
one element beyond it is seen. Nothing is compared here: `test_route_kernel.py` does
that.
"""

import torch

from tests.kernels.random_plans import WORLDS, draw, draw_rows

PLANS = 12
ROWS = (1, 33)


def main():
    launches = 0
    for index in WORLDS:
        world = draw(index, PLANS, "cuda")
        for num_rows in ROWS:
            world.kernel(*draw_rows(world, num_rows))
            torch.cuda.synchronize()
            launches += 1
    print(f"{launches} launches")  # noqa: T201


if __name__ == "__main__":
    main()
