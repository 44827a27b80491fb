# SPDX-License-Identifier: Apache-2.0
"""Copies of rows by a kernel are torch's; `test_triton.py` runs this in a process."""

import math

import pytest
import torch

from moe_tta.kernels import take_rows, take_rows_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(5, 3), (4, 2, 24), (3, 2049), (2, 1), (6,)])
def test_rows_are_torchs(shape, dtype):
    rows = (100 * torch.randn(shape)).to(dtype)
    index = torch.tensor([1, -1, 0, 0, shape[0] - 1, -1, 1])
    found = take_rows_triton.take_rows(rows.to(DEVICE), index.to(DEVICE))
    assert torch.equal(found.cpu(), take_rows.take_rows(rows, index))
    assert not found[1].any()


def test_rows_within_longer_ones():
    joint = torch.arange(60.0, device=DEVICE).view(5, 12)
    index = torch.tensor([4, 2, -1], device=DEVICE)
    found = take_rows_triton.take_rows(joint[:, 4:8].unflatten(1, (2, 2)), index)
    wanted = [[[52.0, 53.0], [54.0, 55.0]], [[28.0, 29.0], [30.0, 31.0]]]
    assert found.tolist() == [*wanted, [[0.0, 0.0], [0.0, 0.0]]]


def test_nothing_is_not_a_number_times_zero():
    rows = torch.full((2, 9), math.nan, device=DEVICE)
    found = take_rows_triton.take_rows(rows, torch.tensor([-1, 1], device=DEVICE))
    assert found[0].tolist() == [0.0] * 9
    assert found[1].isnan().all()


def test_no_rows_are_taken():
    rows = torch.ones(2, 9, device=DEVICE)
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    assert take_rows_triton.take_rows(rows, none).shape == (0, 9)


def test_rows_in_pieces():
    rows = torch.randn(3, 4, 5, device=DEVICE).transpose(1, 2)
    index = torch.tensor([2, -1, 0], device=DEVICE)
    wanted = take_rows.take_rows(rows.cpu(), index.cpu())
    assert torch.equal(take_rows_triton.take_rows(rows, index).cpu(), wanted)
