# SPDX-License-Identifier: Apache-2.0
"""The sum over used columns; `test_triton.py` runs this in a process."""

import math

import pytest
import torch

from moe_tta.kernels import used_sum

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter cuts bfloat16 off where hardware rounds
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16


def in_order(expert_outputs, topk_ids):
    """Sum as vLLM's kernel: float32, column after column, rounded once."""
    total = torch.zeros(expert_outputs[:, 0].shape)
    for column in range(expert_outputs.shape[1]):
        used = topk_ids[:, column, None] >= 0
        total = torch.where(used, total + expert_outputs[:, column].float(), total)
    return total.to(expert_outputs.dtype)


@pytest.mark.parametrize("many", [False, True], ids=["few", "many"])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "width", "hidden"),
    [(0, 2, 8), (1, 1, 8), (3, 2, 96), (7, 8, 128), (5, 12, 1030), (2, 32, 2048)],
)
def test_bit_for_bit(monkeypatch, num_tokens, width, hidden, dtype, many):
    monkeypatch.setattr(used_sum, "MANY_TOKENS", 0 if many else 10**9)
    torch.manual_seed(width)
    topk_ids = torch.randint(-1, 4, (num_tokens, width), dtype=torch.int32)
    topk_ids[: num_tokens // 3] = -1  # nothing used, as in padding
    workspace = torch.randn(num_tokens, width + 1, hidden).to(dtype)
    expert_outputs = workspace[:, :width]
    expert_outputs[topk_ids < 0] = math.nan
    output = torch.full((num_tokens, hidden), math.nan, dtype=dtype, device=DEVICE)
    rows = workspace.to(DEVICE)[:, :width], output, topk_ids.to(DEVICE)
    used_sum.sum_used_columns(*rows)
    assert torch.equal(output.cpu(), in_order(expert_outputs, topk_ids))
