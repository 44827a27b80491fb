# SPDX-License-Identifier: Apache-2.0
"""The hook in a layer's router on a GPU: one routing kernel instead of vLLM's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moe_tta.kernels.recall_triton import RecallKernel, RecallWorkspace
from moe_tta.kernels.reference import Routing, RoutingRule
from moe_tta.kernels.route import ModelRows, RoutingKernel, has_stock_rows
from moe_tta.kernels.table import LayerTable
from moe_tta.shape import RouterShape
from moe_tta.vllm_plugin import compat
from moe_tta.vllm_plugin.experts import let_experts_skip
from moe_tta.vllm_plugin.memories import Memories
from moe_tta.vllm_plugin.rows import StepRows


class GpuLayerRouting:
    """One layer's routing kernel, bound to the step's rows.

    A router that only calls vLLM's `topk_softmax` is replaced by the kernel, which
    gives rows of slot 0 the same bits. Any other router runs as ever, and the kernel
    copies its result for these rows. Both launch the same kernels in every step, so a
    captured graph stays right; where the layer has token memories, rows recall first.

    Args:
        runner: vLLM's MoE runner of the layer.
        rule: The model's own rule, for scores and weights.
        table: The layer's part of the plan table.
        rows: The step's rows, shared by all layers.
        width: Columns of `topk_ids`, the engine's k_max.
        recall: How rows recall, where the layer has token memories.
    """

    def __init__(
        self,
        runner: Any,
        rule: RoutingRule,
        table: LayerTable,
        rows: StepRows,
        width: int,
        recall: RecallKernel | None = None,
    ):
        self.layer = runner.layer_id
        self.rows = rows
        self.recall = recall
        self.follows_stock = has_stock_rows(rule) and compat.is_plain_softmax_router(
            runner.router
        )
        self.skips_unused = let_experts_skip(runner)
        self.kernel = RoutingKernel(
            *(table, rule, width, self.layer),
            model_rows=ModelRows.STOCK if self.follows_stock else ModelRows.GIVEN,
            skip_unused=self.skips_unused,
        )
        self._stock = runner.router._compute_routing
        runner.router.moe_tta = self
        runner.router._compute_routing = self._compute_routing

    def _compute_routing(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        indices_type: torch.dtype | None,
        *,
        input_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stand in for the router's method of this name; ids are int32."""
        num_tokens = router_logits.shape[0]
        padding = given = None
        if self.follows_stock:
            padding = compat.padding_mask(num_tokens)
        else:
            given = Routing(
                *self._stock(
                    hidden_states, router_logits, indices_type, input_ids=input_ids
                )
            )
        rows, recalled = self.rows, None
        if self.recall is not None:
            recalled = self.recall(hidden_states, rows.slots, rows.asking)
        return self.kernel(
            *(router_logits, rows.slots, rows.positions, padding, given),
            num_planned=rows.num_planned,
            recalled=recalled,
        )


def recall_kernels(
    memories: Memories, max_tokens: int, shape: RouterShape, device: torch.device
) -> Callable[[LayerTable, int], RecallKernel | None]:
    """Return what makes a layer's way to recall; layers share one workspace.

    Args:
        memories: The engine's, packed.
        max_tokens: The most rows of a step.
        shape: The model's routers.
        device: Where the memories live.
    """
    space = None
    if memories.count:
        space = RecallWorkspace(max_tokens, shape.num_experts, device)

    def make(table: LayerTable, index: int) -> RecallKernel | None:
        memory = memories.packed(index)
        return None if memory is None else RecallKernel(table, memory, space)

    return make
