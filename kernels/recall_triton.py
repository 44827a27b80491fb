# SPDX-License-Identifier: Apache-2.0
"""Recall (see `recall.py`) as two Triton kernels, for the rows of a step that ask."""

from __future__ import annotations

import torch
import triton

from moe_tta.kernels.launch import Launcher
from moe_tta.kernels.packed_memory import PackedMemory
from moe_tta.kernels.recall import Recalled
from moe_tta.kernels.recall_mean import mean_tokens
from moe_tta.kernels.recall_search import search_tokens
from moe_tta.kernels.table import LayerTable
from moe_tta.plan import MAX_RECALLED

ROWS = 16  # of a product; the least that float64 tensor cores take
BLOCK_N, BLOCK_H = 64, 64  # tokens and numbers of each in a product
BLOCK_C, BLOCK_E = 1024, 32  # candidates and experts at once in the second kernel
LISTS = 65536  # lists of nearest tokens that exist at once: 32 MiB
PROGRAMS_PER_SM = 2
_ON_CPU = 3  # programs where kernels are interpreted


class RecallWorkspace:
    """What recalling writes, made once and shared by an engine's layers.

    Args:
        max_tokens: The most rows of a step.
        num_experts: E.
        device: Where it lives.
    """

    def __init__(self, max_tokens: int, num_experts: int, device: torch.device | str):
        rounded = triton.cdiv(max_tokens, ROWS) * ROWS
        self.lists = torch.empty(
            max(LISTS, rounded), MAX_RECALLED, dtype=torch.int64, device=device
        )
        self.target = torch.zeros(max_tokens, num_experts, device=device)
        self.mix = torch.zeros(max_tokens, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return self.lists.nbytes + self.target.nbytes + self.mix.nbytes


class RecallKernel:
    """Lets the rows that ask recall, in two launches and without a sync.

    The first compares tiles of 16 rows with parts of the memory and lists the nearest
    tokens of each part; the second takes the nearest of the lists and means their
    assignments. How many programs there are depends on the device alone, so that a
    captured graph fits any step; where no row asks they end at once.

    Results equal `recall.recall_rows` on keys of length 1 in float64: products are
    summed in float64, in another order, which the rounding to `recall.GRID` loses.

    Source: kNN-MoE, arXiv 2601.02144; see `recall.recall`.

    Args:
        table: The layer's plans.
        memory: The layer's memories.
        workspace: Shared by all layers, which run one after the other.
    """

    def __init__(
        self, table: LayerTable, memory: PackedMemory, workspace: RecallWorkspace
    ):
        self._table, self._memory, self._workspace = table, memory, workspace
        device = memory.keys.device
        self._programs = _ON_CPU
        if device.type == "cuda":
            found = torch.cuda.get_device_properties(device)
            self._programs = PROGRAMS_PER_SM * found.multi_processor_count
        sizes = {
            "CAPACITY": len(workspace.lists),
            "MAX_SPLITS": self._programs,
            "ROWS": ROWS,
            "BLOCK_N": BLOCK_N,
            "WIDTH": MAX_RECALLED,
            "num_warps": 4,
            "enable_fp_fusion": False,  # round where the law rounds
        }
        places, width = len(memory.starts) - 1, memory.keys.shape[1]
        search = {"PLACES": places, "H": width, "BLOCK_H": BLOCK_H, "num_stages": 3}
        mean = {"E": memory.values.shape[1], "BLOCK_C": BLOCK_C, "BLOCK_E": BLOCK_E}
        self._search = Launcher(search_tokens, lambda *_: sizes | search)
        self._mean = Launcher(mean_tokens, lambda *_: sizes | mean)

    def __call__(
        self, hidden: torch.Tensor, slots: torch.Tensor, asking: torch.Tensor
    ) -> Recalled:
        """Return what T rows recall; only rows whose plan names a memory are written.

        Args:
            hidden: [T, H] router inputs, stride 1 along H.
            slots: [>= T] int32, contiguous.
            asking: [1 + >= T] int32, contiguous: how many rows have a plan that names
                a memory in some layer, then their numbers.
        """
        memory, space, table = self._memory, self._workspace, self._table
        num_rows = len(hidden)
        plans = table.packed
        rows = (asking, slots, plans)
        numbers = (plans.stride(0) // 4, num_rows)
        grid, kind = (self._programs, 1, 1), (hidden.dtype, hidden.stride(0))
        self._search(
            grid,
            (hidden, *rows, *memory.searched, space.lists),
            (hidden.stride(0), *numbers),
            kind,
        )
        self._mean(
            grid,
            (*rows, memory.values, memory.starts, space.lists, space.target, space.mix),
            numbers,
            kind,
        )
        return Recalled(space.target[:num_rows], space.mix[:num_rows])
