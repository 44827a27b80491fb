# SPDX-License-Identifier: Apache-2.0
"""The law of routing (see `reference.py`) as one Triton kernel, one program per row."""

from __future__ import annotations

import math

import torch
import triton

from moe_tta.kernels.reference import Routing
from moe_tta.kernels.route_checks import check_rows, check_rule, check_table
from moe_tta.kernels.route_model import SumOrder
from moe_tta.kernels.route_row import ModelRows, route_row
from moe_tta.kernels.scores import RoutingRule
from moe_tta.kernels.table import LayerTable


class RoutingKernel:
    """Routes rows by their slots' plans, in one launch and without a sync.

    Ids equal those of `reference.route` and weights differ by float32 rounding only,
    so an id may differ where that rounding decides (two experts of nearly equal
    blended or biased score, a sum next to its threshold). Rows with NaN get ids in
    range and nothing else is promised.

    Source: the papers that `reference.route` names.

    Args:
        table: The layer's plans, as `PlanTable.layer` returns them.
        rule: The layer's own rule.
        width: Columns of the result, `rule.top_k` to E.
        layer: Decoder-layer number, read by `Select.SAMPLE` only.
        model_rows: What rows of slot 0 get; the default is `STOCK` where it exists.
        skip_unused: Unused columns get id -1, for experts that skip it; otherwise
            they repeat the row's first id. Their weight is 0.

    Raises:
        ValueError: an argument has the wrong shape, dtype, layout or device.
    """

    def __init__(
        self,
        table: LayerTable,
        rule: RoutingRule,
        width: int,
        layer: int,
        model_rows: ModelRows | None = None,
        skip_unused: bool = False,
    ):
        device, num_experts = table.bias.device, table.bias.shape[1]
        check_table(table, device)
        check_rule(rule, width, num_experts, device)
        if model_rows is None:
            model_rows = ModelRows.STOCK if has_stock_rows(rule) else ModelRows.LAW
        if model_rows is ModelRows.STOCK and not has_stock_rows(rule):
            raise ValueError(f"rows of {rule} have no stock kernel to follow")
        self.table = table
        self.rule = rule
        self.width = width
        self.layer = layer
        self.model_rows = model_rows
        self.skip_unused = skip_unused
        self._constants = _constants(rule, width, num_experts, model_rows)

    def __call__(
        self,
        router_logits: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        padding: torch.Tensor | None = None,
        given: Routing | None = None,
    ) -> Routing:
        """Return the routing of T rows.

        Args:
            router_logits: [T, >= E], any float dtype and strides; columns beyond E
                are ignored.
            slots: [T] int32 or int64, contiguous; each row's slot in the table.
            positions: [T] int64, contiguous; absolute positions, in tokens.
            padding: [T] bool, contiguous; rows that are no token get id -1.
            given: [T, top_k] routing for rows of slot 0, with `ModelRows.GIVEN` only.

        Raises:
            ValueError: an argument has the wrong shape, dtype, layout or device.
        """
        num_tokens, num_experts = len(router_logits), self.table.bias.shape[1]
        check_rows(router_logits, slots, positions, num_experts, padding)
        if (given is not None) != (self.model_rows is ModelRows.GIVEN):
            raise ValueError(
                "a given routing goes with ModelRows.GIVEN, and only there"
            )
        device = router_logits.device
        shape = (num_tokens, self.width)
        weights = torch.empty(shape, dtype=torch.float32, device=device)
        ids = torch.empty(shape, dtype=torch.int32, device=device)
        if num_tokens == 0:
            return Routing(weights, ids)
        table, bias = self.table, self.rule.correction_bias
        order = SumOrder.of(num_experts, router_logits.dtype)
        route_row[(num_tokens,)](
            *(weights, ids, router_logits, *router_logits.stride(), slots, positions),
            slots if padding is None else padding,
            *((weights, ids) if given is None else given),
            *(*table, table.bias.stride(0), table.mix.stride(0)),
            table.select_args.stride(0),
            router_logits if bias is None else bias,
            self.layer,
            HAS_PADDING=padding is not None,
            SKIP_UNUSED=self.skip_unused,
            RUN=order.run,
            THREADS=order.threads,
            LOADS=order.loads,
            IN_WARP=order.in_warp,
            EXACT=router_logits.is_cuda,
            **self._constants,
        )
        return Routing(weights, ids)


def has_stock_rows(rule: RoutingRule) -> bool:
    """Return whether stock vLLM routes by its `topk_softmax` kernel here."""
    return (
        rule.scoring == "softmax"
        and rule.num_expert_group == 1
        and rule.correction_bias is None
        and rule.routed_scaling_factor == 1.0
    )


def route_triton(
    router_logits: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    table: LayerTable,
    rule: RoutingRule,
    width: int,
    layer: int,
) -> Routing:
    """Route every row by its slot's plan; see `RoutingKernel` for the arguments."""
    kernel = RoutingKernel(table, rule, width, layer)
    return kernel(router_logits, slots, positions)


def _constants(
    rule: RoutingRule, width: int, num_experts: int, model_rows: ModelRows
) -> dict:
    """Return what is compiled into the kernel and the same in every call."""
    block = triton.next_power_of_2(num_experts)
    return {
        "E": num_experts,
        "LOG_E": math.log(num_experts),
        "BLOCK_E": block,
        "WIDTH": width,
        "BLOCK_W": triton.next_power_of_2(width),
        "TOP_K": rule.top_k,
        "SCORING": rule.scoring,
        "BIASED": rule.correction_bias is not None,
        "RENORMALIZES": rule.always_renormalizes,
        "GROUPS": rule.num_expert_group,
        "TOPK_GROUP": rule.topk_group,
        "FACTOR": rule.routed_scaling_factor,
        "MODEL_ROWS": model_rows.value,
        # one warp: every reduction stays in registers
        "num_warps": 1 if block <= 512 else 4,
        "enable_fp_fusion": False,  # round where the law rounds
    }
