# SPDX-License-Identifier: Apache-2.0
"""The hook in a layer's router on a GPU: one routing kernel instead of vLLM's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moe_tta.kernels.recall import LayerMemory, recall_rows
from moe_tta.kernels.reference import Routing, RoutingRule, route
from moe_tta.kernels.route import ModelRows, RoutingKernel, has_stock_rows
from moe_tta.kernels.table import LayerTable
from moe_tta.vllm_plugin import compat
from moe_tta.vllm_plugin.experts import let_experts_skip
from moe_tta.vllm_plugin.rows import StepRows


class GpuLayerRouting:
    """One layer's routing kernel, bound to the step's rows.

    A router that only calls vLLM's `topk_softmax` is replaced by the kernel, which
    gives rows of slot 0 the same bits. Any other router runs as ever, and the kernel
    copies its result for these rows. Both launch the same kernels in every step, so a
    captured graph stays right. An engine with token memories routes all rows once more
    by the law in plain torch, and takes the rows whose plan names a memory from there.

    Args:
        runner: vLLM's MoE runner of the layer.
        rule: The model's own rule, for scores and weights.
        table: The layer's part of the plan table.
        rows: The step's rows, shared by all layers.
        width: Columns of `topk_ids`, the engine's k_max.
        memories: The layer's token memories by place.
    """

    def __init__(
        self,
        runner: Any,
        rule: RoutingRule,
        table: LayerTable,
        rows: StepRows,
        width: int,
        memories: Sequence[LayerMemory | None] = (),
    ):
        self.layer = runner.layer_id
        self.rows = rows
        self.memories = memories
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
        rows = self.rows
        routing = self.kernel(
            *(router_logits, rows.slots, rows.positions, padding, given),
            num_planned=rows.num_planned,
        )
        if not self.memories:
            return routing
        return self._with_recall(routing, hidden_states, router_logits)

    def _with_recall(
        self,
        routing: Routing,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
    ) -> Routing:
        """Replace the rows whose plan names a memory; the others keep their bits."""
        kernel, table = self.kernel, self.kernel.table
        slots = self.rows.slots[: len(router_logits)]
        planned = route(
            router_logits,
            slots,
            self.rows.positions[: len(slots)],
            table,
            kernel.rule,
            kernel.width,
            self.layer,
            recalled=recall_rows(hidden_states, slots, table, self.memories),
        )
        ours = table.memory.index_select(0, slots)[:, None] > 0
        return Routing(
            torch.where(ours, planned.topk_weights, routing.topk_weights),
            torch.where(ours, planned.topk_ids, routing.topk_ids),
        )
