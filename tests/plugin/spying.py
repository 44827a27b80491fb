# SPDX-License-Identifier: Apache-2.0
"""What an engine's routers answer, and the oracle's answer to the same logits."""

from contextlib import contextmanager
from typing import NamedTuple

import torch
from safetensors import safe_open

from moe_tta.compile import compile_request
from moe_tta.kernels.reference import RoutingRule, model_routing, route
from moe_tta.kernels.table import PlanTable
from moe_tta.plan import RoutingPlan
from moe_tta.spec import parse
from moe_tta.strategies import PlanContext
from moe_tta.vllm_plugin.runner_seams import moe_runners


class Routed(NamedTuple):
    """One call of a layer's router; T rows, the first request's first."""

    layer: int
    logits: torch.Tensor  # [T, E]
    weights: torch.Tensor  # [T, k_max]
    ids: torch.Tensor  # [T, k_max]
    hidden: torch.Tensor  # [T, H], what the router was given


def runners(llm):
    """Return the MoE runners of an engine in this process."""
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    return moe_runners(runner.vllm_config)


@contextmanager
def spied(llm):
    """Yield a list that every call of a router is noted in, rows on the CPU."""
    calls, undo = [], []

    def spy(layer, router):
        inner = router._compute_routing

        def compute_routing(hidden_states, router_logits, *args, **kwargs):
            logits, hidden = router_logits.clone(), hidden_states.clone().cpu()
            weights, ids = inner(hidden_states, router_logits, *args, **kwargs)
            found = logits.cpu(), weights.cpu(), ids.cpu()
            calls.append(Routed(layer, *found, hidden))
            return weights, ids

        router._compute_routing = compute_routing
        undo.append((router, inner))

    for runner in runners(llm):
        spy(runner.layer_id, runner.router)
    try:
        yield calls
    finally:
        for router, inner in undo:
            router._compute_routing = inner


def saved_bias(folder, layer):
    """Return a layer's correction bias as the checkpoint holds it, or `None`."""
    with safe_open(f"{folder}/model.safetensors", "pt") as tensors:
        ending = f"layers.{layer}.mlp.gate.e_score_correction_bias"
        names = [name for name in tensors.keys() if name.endswith(ending)]  # noqa: SIM118
        return tensors.get_tensor(names[0]) if names else None


class Oracle:
    """The law with rules written down by hand and biases from the checkpoint."""

    def __init__(self, folder, shape, request):
        plans = compile_request(parse(request, presets={}), PlanContext(shape)).plans
        assert len(set(map(id, plans))) == 1, "the request must treat all rows alike"
        self.shape = shape
        self.table = PlanTable(shape, 1, "cpu")
        self.table.write({1: plans[0] or RoutingPlan()})
        self.rules = {
            layer: RoutingRule.from_shape(shape, saved_bias(folder, layer))
            for layer in shape.layers
        }

    def own(self, call):
        """Return the model's own routing of a call's rows."""
        return model_routing(call.logits, self.rules[call.layer], self.shape.k_max)

    def planned(self, call):
        """Return the routing of a call's rows under the plan."""
        rows = torch.arange(len(call.logits))
        return route(
            call.logits,
            torch.ones_like(rows),
            rows,
            self.table.layer(self.shape.layers.index(call.layer)),
            self.rules[call.layer],
            self.shape.k_max,
            call.layer,
        )
