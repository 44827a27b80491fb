# SPDX-License-Identifier: Apache-2.0
"""When a launch is Triton's own, and what the compiled kernel is given afterwards."""

import torch

from moe_tta.kernels.launch import Launcher


class FakeKernel:
    """Notes its launches; what it returns notes the compiled form's."""

    arg_names = ("a_ptr", "b_ptr", "count", "WIDTH", "DEPTH")

    def __init__(self, compiles=True):
        self.compiles, self.first, self.later = compiles, [], []

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.first.append((grid, args, constants))
            return CompiledForm(self.later) if self.compiles else None

        return launch


class CompiledForm:
    def __init__(self, calls):
        self.calls = calls

    def __getitem__(self, grid):
        return lambda *args: self.calls.append((grid, args))


def make(**options):
    kernel = FakeKernel(**options)
    return kernel, Launcher(kernel, lambda width: {"DEPTH": 5, "WIDTH": width, "x": 1})


GRID = 2, 1, 1
A, B = torch.zeros(64), torch.zeros(64)


def test_the_second_launch_of_a_kind_takes_addresses_and_constants_in_order():
    kernel, launch = make()
    launch(GRID, (A, B), (7,), (3,))
    launch(GRID, (B, A), (8,), (3,))
    assert kernel.first == [(GRID, (A, B, 7), {"DEPTH": 5, "WIDTH": 3, "x": 1})]
    assert kernel.later == [(GRID, (B.data_ptr(), A.data_ptr(), 8, 3, 5))]


def test_other_kinds_and_alignments_are_compiled_anew():
    kernel, launch = make()
    aligned = A[-A.data_ptr() // 4 % 4 :]
    for tensor, width in ((aligned, 3), (aligned, 4), (aligned[1:], 3), (aligned, 3)):
        launch(GRID, (tensor, B), (7,), (width,))
    assert len(kernel.first) == 3
    assert len(kernel.later) == 1


def test_an_interpreted_kernel_is_always_given_tensors():
    kernel, launch = make(compiles=False)
    for _ in range(2):
        launch(GRID, (A, B), (7,), (3,))
    assert len(kernel.first) == 2
    assert kernel.later == []
