# SPDX-License-Identifier: Apache-2.0
"""The hook in a layer's router on CPU: the stock selection, then rows with plans."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from moe_tta.kernels.recall import LayerMemory, recall_rows
from moe_tta.kernels.reference import RoutingRule, route
from moe_tta.kernels.table import Features, LayerTable
from moe_tta.vllm_plugin import compat
from moe_tta.vllm_plugin.rows import StepRows


class LayerRouting:
    """Applies the step's plans to one layer's routing, in place.

    Args:
        layer: The decoder layer's number.
        rule: The model's own rule, for scores and weights.
        table: The layer's part of the plan table.
        rows: The step's rows, shared by all layers.
        width: Columns of `topk_ids`, the engine's k_max.
        memories: The layer's token memories by place.
    """

    def __init__(
        self,
        layer: int,
        rule: RoutingRule,
        table: LayerTable,
        rows: StepRows,
        width: int,
        memories: Sequence[LayerMemory | None] = (),
    ):
        self.layer = layer
        self.rule = rule
        self.table = table
        self.rows = rows
        self.width = width
        self.memories = memories
        self.observer: Callable | None = None
        self.skips_unused = False  # vLLM's CPU experts crash on id -1

    def apply(
        self,
        router_logits: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        hidden_states: torch.Tensor | None = None,
    ) -> None:
        """Overwrite the rows with plans; the others keep the stock selection.

        Args:
            router_logits: [T, >= num_experts], any float dtype.
            topk_weights: [T, width] float32, overwritten.
            topk_ids: [T, width] int32 or int64, overwritten.
            hidden_states: [T, H] router inputs, where the layer has memories.
        """
        stock_ids = topk_ids.clone() if self.observer else None
        self._overwrite(router_logits, topk_weights, topk_ids, hidden_states)
        if self.observer:
            self.observer(self.layer, stock_ids, topk_ids, topk_weights)

    def _overwrite(self, router_logits, topk_weights, topk_ids, hidden_states) -> None:
        planned = self.rows.planned
        if planned is None:
            return
        slots, recalled = self.rows.slots[planned], None
        if self.memories and self.rows.features & Features.RECALL:
            hidden = hidden_states[planned]
            recalled = recall_rows(hidden, slots, self.table, self.memories)
        weights, ids = route(
            router_logits[planned],
            slots,
            self.rows.positions[planned],
            self.table,
            self.rule,
            self.width,
            self.layer,
            self.rows.features,
            recalled,
        )
        topk_weights[planned] = weights
        topk_ids[planned] = ids.to(topk_ids.dtype)


def arm_router(runner: Any, routing: LayerRouting) -> None:
    """Put `routing` behind the stock selection of one MoE runner's router.

    The instance's `_compute_routing` is replaced, not the router: capture of routed
    experts, expert mapping and dtype conversion stay vLLM's own.
    """
    router, width = runner.router, routing.width
    stock = router._compute_routing
    layer_name = compat.layer_name_argument(runner.layer_name)

    def compute_routing(hidden_states, router_logits, indices_type, *, input_ids=None):
        weights, ids = stock(
            hidden_states, router_logits, indices_type, input_ids=input_ids
        )
        extra = width - ids.shape[1]
        if extra:
            # unused columns: the row's own first expert with weight 0
            weights = torch.nn.functional.pad(weights, (0, extra))
            ids = torch.cat([ids, ids[:, :1].expand(-1, extra)], dim=1)
        inputs = hidden_states if routing.memories else None
        torch.ops.moe_tta.apply_plans(router_logits, weights, ids, inputs, layer_name)
        return weights, ids

    router.moe_tta = routing
    router._compute_routing = compute_routing


def _apply_plans(
    router_logits: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    hidden_states: torch.Tensor | None,
    layer_name: compat.LayerNameType,
) -> None:
    routing = compat.running_layer(layer_name).router.moe_tta
    routing.apply(router_logits, topk_weights, topk_ids, hidden_states)


def _apply_plans_fake(
    router_logits: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    hidden_states: torch.Tensor | None,
    layer_name: compat.LayerNameType,
) -> None:
    return None


# an opaque op: torch.compile must not look at the step's rows, which change
compat.register_op(
    "apply_plans",
    _apply_plans,
    _apply_plans_fake,
    mutates=["topk_weights", "topk_ids"],
)
