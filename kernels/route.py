# SPDX-License-Identifier: Apache-2.0
"""The law of routing (see `reference.py`) as one Triton kernel, launched."""

from __future__ import annotations

import math

import torch
import triton

from moe_tta.kernels.launch import Launcher, can_overlap, is_nvidia
from moe_tta.kernels.recall import Recalled
from moe_tta.kernels.reference import Routing
from moe_tta.kernels.route_checks import check_rows, check_rule, check_table
from moe_tta.kernels.route_model import SumOrder
from moe_tta.kernels.route_nets import RUN
from moe_tta.kernels.route_row import ModelRows, route_rows
from moe_tta.kernels.scores import RoutingRule
from moe_tta.kernels.table import LayerTable

MANY_ROWS = 4096  # from here on a program takes several rows
MANY_WITH_PLANS = 16384  # the same where some rows have plans
# rows of a program and lanes of each, where rows are runs: the second from 2 E^2 rows
# on. Fastest of eight on an H200 (docs/log.md)
_FEW_RUNS, _MANY_RUNS = (8, 4), (16, 2)


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
        num_experts = table.bias.shape[1]
        check_table(table)
        check_rule(rule, width, num_experts, table.packed.device)
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
        packed, bias = table.packed, rule.correction_bias
        self._fixed = packed, packed if bias is None else bias
        self._layer = packed.stride(0), layer
        self._constants = _constants(rule, width, num_experts, model_rows, skip_unused)
        self._tile = self._rows_together(), 0
        self._has_runs = self._fits_runs()
        self._launch = Launcher(route_rows, self._all_constants)

    def __call__(
        self,
        router_logits: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        padding: torch.Tensor | None = None,
        given: Routing | None = None,
        num_planned: int = 0,
        recalled: Recalled | None = None,
    ) -> Routing:
        """Return the routing of T rows; arguments are not checked, `check_rows` does.

        Args:
            router_logits: [T, >= E] f32, bf16 or f16, any strides; columns beyond E
                are ignored.
            slots: [>= T] int32 or int64, contiguous; each row's slot in the table.
            positions: [>= T] int64, contiguous; absolute positions, in tokens.
            padding: [T] bool, contiguous; rows that are no token get id -1.
            given: [T, top_k] contiguous routing for rows of slot 0, needed with
                `ModelRows.GIVEN`.
            num_planned: About how many rows have a plan. This decides what is fast,
                never the result.
            recalled: What the rows recall, contiguous; read where a row's plan names a
                memory, and needed if one does.
        """
        num_tokens, device = router_logits.shape[0], router_logits.device
        shape = (num_tokens, self.width)
        weights = torch.empty(shape, dtype=torch.float32, device=device)
        ids = torch.empty(shape, dtype=torch.int32, device=device)
        if num_tokens == 0:
            return Routing(weights, ids)
        rows, lanes = self._rows_and_lanes(router_logits, num_planned)
        strides = router_logits.stride()
        self._launch(
            (-(-num_tokens // rows), 1, 1),
            (
                *(weights, ids, router_logits, slots, positions),
                slots if padding is None else padding,
                *((weights, ids) if given is None else given),
                *self._fixed,
                *((weights, weights) if recalled is None else recalled),
            ),
            (*strides, *self._layer, num_tokens, self.rule.top_k),
            (
                rows,
                lanes,
                router_logits.dtype,
                padding is not None,
                recalled is not None,
                slots.dtype,
                strides,
            ),
        )
        return Routing(weights, ids)

    def _rows_and_lanes(
        self, router_logits: torch.Tensor, num_planned: int
    ) -> tuple[int, int]:
        """Return how many rows a program takes, and lanes of each; 0 without runs."""
        num_tokens = len(router_logits)
        if router_logits.itemsize != 2 or not _fits_tiles(num_tokens, num_planned):
            return 1, 0
        # one row with a plan makes its program's other runs wait: 25 instead of 4 us
        if num_planned or not self._has_runs or router_logits.stride(1) != 1:
            return self._tile
        many = 2 * self.table.bias.shape[1] ** 2
        return _MANY_RUNS if num_tokens >= many else _FEW_RUNS

    def _all_constants(
        self,
        rows: int,
        lanes: int,
        dtype: torch.dtype,
        has_padding: bool,
        recalls: bool,
        *_: object,
    ) -> dict:
        """Return the constants of a kind of launch.

        Given and recalled rows have the same types in every call.
        """
        packed, num_experts = self.table.packed, self.table.bias.shape[1]
        overlap = can_overlap(route_rows, packed.device)
        return {
            **self._constants,
            **SumOrder.of(num_experts, dtype)._asdict(),
            "ROWS": rows,
            "LANES": lanes,
            "HAS_PADDING": has_padding,
            "RECALLS": recalls,
            "EXACT": is_nvidia(packed.device),
            "OVERLAP": overlap,
            "launch_pdl": overlap,
        }

    def _rows_together(self) -> int:
        """Return how many rows of 16-bit logits a program takes when there are many."""
        num_experts = self.table.bias.shape[1]
        together = (
            self.model_rows is ModelRows.STOCK
            and self.rule.top_k < num_experts
            and SumOrder.of(num_experts, torch.bfloat16).IN_WARP
        )
        # eight experts a lane and at least four rows: fastest of 1 to 256 on an H200
        return max(4, 256 // self._constants["BLOCK_E"]) if together else 1

    def _fits_runs(self) -> bool:
        """Return whether `route_nets` can take rows of neighbouring 16-bit logits."""
        num_experts = self.table.bias.shape[1]
        return (
            self.model_rows is ModelRows.STOCK
            and self.width <= RUN
            and num_experts in (32, 64, 128, 256)
        )


def _fits_tiles(num_tokens: int, num_planned: int) -> bool:
    """Return whether tiles are faster, in which rows with plans wait for each other."""
    if not num_planned:
        return num_tokens >= MANY_ROWS
    return num_tokens >= MANY_WITH_PLANS and 2 * num_planned <= num_tokens


def has_stock_rows(rule: RoutingRule) -> bool:
    """Return whether stock vLLM routes by its `topk_softmax` kernel here."""
    return rule.plain and rule.scoring == "softmax"


def route_triton(
    router_logits: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    table: LayerTable,
    rule: RoutingRule,
    width: int,
    layer: int,
    num_planned: int = 0,
) -> Routing:
    """Route every row by its slot's plan; see `RoutingKernel` for the arguments.

    Raises:
        ValueError: an argument has the wrong shape, dtype, layout or device.
    """
    kernel = RoutingKernel(table, rule, width, layer)
    check_rows(router_logits, slots, positions, table.bias.shape[1])
    return kernel(router_logits, slots, positions, num_planned=num_planned)


def _constants(
    rule: RoutingRule,
    width: int,
    num_experts: int,
    model_rows: ModelRows,
    skip_unused: bool,
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
        "SKIP_UNUSED": skip_unused,
        # one warp: every reduction stays in registers
        "num_warps": 1 if block <= 512 else 4,
        "enable_fp_fusion": False,  # round where the law rounds
    }
