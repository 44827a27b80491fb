# SPDX-License-Identifier: Apache-2.0
"""A step's rows as GPU engines stage them, on CPU."""

import numpy as np
import torch

from moe_tta.kernels.table import PlanTable
from moe_tta.vllm_plugin.rows import StepRows
from moe_tta.vllm_plugin.slots import SlotTable
from tests.kernels.cases import make_shape


def make_rows(max_tokens=32, num_slots=12):
    """Return rows of a GPU's kind, whose copies go to memory of the CPU."""
    table = PlanTable(make_shape(), num_slots, "cpu")
    rows = StepRows(max_tokens, torch.device("cpu"), SlotTable(table, num_slots))
    rows.on_cpu = False
    for name in ("slots", "positions", "asking"):
        setattr(rows, name, getattr(rows, name).clone())
    return rows


def stage(rows, requests, chunks):
    """Stage chunks of (request, tokens, first position)."""
    names, counts, starts = zip(*chunks, strict=True)
    rows.stage(requests, names, np.array(counts), np.array(starts))
