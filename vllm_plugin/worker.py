# SPDX-License-Identifier: Apache-2.0
"""The worker's side: arm the model's routers, follow requests, stage each step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moe_tta.kernels.reference import RoutingRule
from moe_tta.kernels.table import LayerTable, PlanTable
from moe_tta.shape import RouterShape
from moe_tta.vllm_plugin import compat
from moe_tta.vllm_plugin.limits import refuse_unsupported
from moe_tta.vllm_plugin.memories import Memories
from moe_tta.vllm_plugin.model_shape import (
    UnsupportedModelError,
    shape_from_config,
)
from moe_tta.vllm_plugin.options import read_settings
from moe_tta.vllm_plugin.pair_rows import PairRows, kernels, plain_torch
from moe_tta.vllm_plugin.pathways import PathwayRecorder
from moe_tta.vllm_plugin.round_orders import ORDERS
from moe_tta.vllm_plugin.round_worker import RoundWorker
from moe_tta.vllm_plugin.router import LayerRouting, arm_router
from moe_tta.vllm_plugin.router_shape import correction_bias, shape_from_routers
from moe_tta.vllm_plugin.rows import PlannedRequest, StepRows
from moe_tta.vllm_plugin.slots import (
    PLANS_PER_REQUEST,
    PLANS_PER_VERSIONED_REQUEST,
    SlotTable,
)
from moe_tta.vllm_plugin.trace import TraceRecorder
from moe_tta.vllm_plugin.versions import VersionedRequest, unplanned

if TYPE_CHECKING:
    from moe_tta.vllm_plugin.gpu_router import GpuLayerRouting
    from moe_tta.vllm_plugin.pair_rows import CombineRows

logger = compat.get_logger(__name__)


class WorkerState:
    """What one model runner holds for the plugin.

    Requests with a plan are remembered from their first scheduling to their end;
    everything else is derived in each step from the scheduler's own numbers.
    """

    def __init__(self, vllm_config: Any, device: torch.device):
        self.vllm_config = vllm_config
        self.device = device
        self.requests: dict[str, PlannedRequest | VersionedRequest] = {}
        self.rows: StepRows | None = None
        self.armed: list[LayerRouting | GpuLayerRouting] = []
        self.shape: RouterShape | None = None
        self.memories: Memories | None = None
        self.trace: TraceRecorder | None = None
        self.recorder: PathwayRecorder | None = None
        self.rounds: RoundWorker | None = None
        self.pairs = PairRows(device, self._combine_rows())

    def _combine_rows(self) -> dict[str, CombineRows]:
        if self.device.type == "cpu":
            return plain_torch()
        max_pairs = self.vllm_config.scheduler_config.max_num_seqs // 2
        vocab_size = self.vllm_config.model_config.get_vocab_size()
        return kernels(max_pairs, vocab_size, self.device)

    def arm(self, runners: Sequence[Any]) -> None:
        """Hook every MoE layer, or refuse the model.

        Raises:
            UnsupportedModelError: config and routers disagree, or the set-up is one
                in which plans could not be honoured.
        """
        settings = read_settings(self.vllm_config)
        config = shape_from_config(
            self.vllm_config.model_config.hf_text_config, settings.k_max
        )
        if config is None and not runners:
            return
        if config is None or not runners:
            named = 0 if config is None else len(config.layers)
            raise UnsupportedModelError.because(
                f"the model's config names {named} MoE layers where moe-tta looks for "
                f"them, vLLM loaded {len(runners)}"
            )
        refuse_unsupported(self.vllm_config, runners)
        shape = shape_from_routers(runners, config)
        if shape != config:
            raise UnsupportedModelError.because(
                "the loaded routers differ from the model's config: "
                + shape.difference(config)
            )
        self.shape = shape
        self._arm_layers(runners, shape)
        if settings.trace_dir is not None:
            self._start_trace(Path(settings.trace_dir))

    def _start_trace(self, folder: Path) -> None:
        if self.device.type != "cpu":
            raise UnsupportedModelError("moe_tta.trace_dir works on CPU engines only")
        self.trace = TraceRecorder(folder, len(self.armed))
        for routing in self.armed:
            routing.observer = self.trace.observe

    def _arm_layers(self, runners: Sequence[Any], shape: RouterShape) -> None:
        scheduler = self.vllm_config.scheduler_config
        settings = read_settings(self.vllm_config)
        adapted = settings.adapter is not None
        plans = PLANS_PER_VERSIONED_REQUEST if adapted else PLANS_PER_REQUEST
        num_slots = plans * scheduler.max_num_seqs
        table = PlanTable(shape, num_slots, self.device)
        captured = self.vllm_config.compilation_config.max_cudagraph_capture_size or 0
        max_tokens = max(scheduler.max_num_batched_tokens, captured)
        self.rows = StepRows(max_tokens, self.device, SlotTable(table, num_slots))
        self.memories = Memories.load(
            settings, self.vllm_config, shape, self.device, not self.rows.on_cpu
        )
        arm = self._arm_on_cpu if self.rows.on_cpu else self._armer(max_tokens, shape)
        for index, runner in enumerate(runners):
            rule = RoutingRule.from_shape(shape, correction_bias(runner.router))
            self.armed.append(arm(runner, rule, table.layer(index), index))
        logger.info(
            "moe-tta armed %d/%d layers: %d experts, top-%d (k_max %d), %s%s, %s, "
            "%d plan slots (%.1f MiB)",
            len(self.armed),
            len(shape.layers),
            shape.num_experts,
            shape.top_k,
            shape.k_max,
            shape.scoring,
            ", renormalised" if shape.renormalize else "",
            self._describe_kernel(),
            num_slots,
            table.nbytes / 2**20,
        )
        if self.memories.count:
            logger.info(
                "moe-tta loaded %d token stores (%.1f MiB)",
                self.memories.count,
                self.memories.nbytes / 2**20,
            )

    def _arm_on_cpu(
        self, runner: Any, rule: RoutingRule, table: LayerTable, index: int
    ) -> LayerRouting:
        width, memories = self.shape.k_max, self.memories.layer(index)
        routing = LayerRouting(runner.layer_id, rule, table, self.rows, width, memories)
        arm_router(runner, routing)
        return routing

    def _armer(
        self, max_tokens: int, shape: RouterShape
    ) -> Callable[[Any, RoutingRule, LayerTable, int], GpuLayerRouting]:
        """Return how a layer is armed on a GPU."""
        from moe_tta.vllm_plugin.gpu_router import GpuLayerRouting, recall_kernels

        recalls = recall_kernels(self.memories, max_tokens, shape, self.device)

        def arm(
            runner: Any, rule: RoutingRule, table: LayerTable, index: int
        ) -> GpuLayerRouting:
            recall = recalls(table, index)
            return GpuLayerRouting(runner, rule, table, self.rows, shape.k_max, recall)

        return arm

    def _describe_kernel(self) -> str:
        if self.rows.on_cpu:
            return "plans in plain torch"
        first = self.armed[0]
        how = "instead of" if first.follows_stock else "after"
        unused = "skipped" if first.skips_unused else "computed with weight 0"
        return f"one kernel {how} vLLM's selection, unused experts {unused}"

    def requests_changed(self, finished: Iterable[str], new: Iterable[Any]) -> None:
        """Forget finished requests, remember new ones with a plan or a partner."""
        if self.recorder is not None:
            self.recorder.requests_changed(new)
        # nearly all say nothing; what the plugin has to say of one is among these
        new = [r for r in new if r.sampling_params and r.sampling_params.extra_args]
        self.pairs.requests_changed(finished, new)
        if self.trace is not None:
            self.trace.finish(finished)
        for req_id in finished:
            self.requests.pop(req_id, None)
        for request in new:
            planned = PlannedRequest.from_new(request)
            before = self.requests.get(request.req_id)
            if isinstance(before, VersionedRequest):  # adapted before it was scheduled
                planned = before.with_own(planned or unplanned(before.prompt_len))
            if planned is not None:
                self.requests[request.req_id] = planned
        if not self.requests and self.rows is not None:
            self.rows.clear()

    def load_services(self, model: Any) -> None:
        """Build what does the work of rounds, if the operator wants it.

        Raises:
            UnsupportedModelError: it cannot work on this model or set-up.
        """
        adapter = read_settings(self.vllm_config).adapter
        if adapter is None or self.rows is None:
            return
        services = {}
        if adapter.gradients:
            from moe_tta.vllm_plugin.adapter_loading import load_services

            services = load_services(self.vllm_config, model)
        self.rounds = RoundWorker(services, self.requests)

    def obey(self, scheduler_output: Any) -> None:
        """Do the orders that came with a step, before its forward pass."""
        orders = getattr(scheduler_output, ORDERS, ())
        self.rounds.obey(orders, scheduler_output.finished_req_ids)

    def stage(
        self, req_ids: Sequence[str], num_scheduled: np.ndarray, num_computed: Any
    ) -> None:
        """Write the coming step's rows. See `StepRows.stage`."""
        if self.trace is not None:
            self.trace.begin_step(req_ids, num_scheduled, num_computed)
        if self.recorder is not None:
            self.recorder.begin_step(req_ids, num_scheduled, num_computed)
        if self.rows is not None:
            self.rows.stage(self.requests, req_ids, num_scheduled, num_computed)

    def status(self) -> dict[str, Any]:
        """Return what is armed and held, as plain data."""
        pinned = self.rows.slot_table.pinned if self.rows else {}
        return {
            "armed_layers": [routing.layer for routing in self.armed],
            "skips_unused": all(routing.skips_unused for routing in self.armed),
            "requests_with_plan": len(self.requests),
            "slots_in_use": len(pinned),
            "pairs": len(self.pairs.links),
            "jobs": 0 if self.rounds is None else len(self.rounds.jobs),
            "token_stores": self.memories.count if self.memories else 0,
        }
