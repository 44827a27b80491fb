# SPDX-License-Identifier: Apache-2.0
"""Router constants of a model as its loaded routers hold them.

Source: `vllm/model_executor/layers/fused_moe/router` of vLLM 0.32.0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from moe_tta.shape import RouterShape
from moe_tta.vllm_plugin.model_shape import UnsupportedModelError

# scores that vLLM's routers and the routing law share
SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus")

OWN_FUNCTION = "the model brings its own routing function, which no plan can follow"
HASHED = "the routers choose experts by token id, not by their logits"
FUSED = "the routers append shared experts to every row's choice"


def correction_bias(router: Any) -> torch.Tensor | None:
    """Return the router's own live [E] correction bias, `None` without one."""
    return getattr(router, "e_score_correction_bias", None)


def shape_from_routers(runners: Sequence[Any], config: RouterShape) -> RouterShape:
    """Read the router shape from the loaded model's MoE runners.

    Args:
        runners: vLLM's MoE runners in layer order, at least one.
        config: The shape read from the config, for what routers do not hold.

    Raises:
        UnsupportedModelError: a router of another kind, or routers that differ.
    """
    first, *others = [_router_shape(runner.router, config) for runner in runners]
    for runner, shape in zip(runners[1:], others, strict=True):
        if shape != first:
            raise UnsupportedModelError.because(
                f"the routers of layers {runners[0].layer_id} and {runner.layer_id} "
                f"differ: {first.difference(shape)}"
            )
    return replace(first, layers=tuple(runner.layer_id for runner in runners))


def _router_shape(router: Any, config: RouterShape) -> RouterShape:
    name = type(router).__name__
    if name in REFUSED:
        raise UnsupportedModelError.because(f"{REFUSED[name]} ({name})")
    if name not in READERS:
        raise UnsupportedModelError.because(f"it does not know routers of kind {name}")
    shape = RouterShape(
        layers=(),
        num_hidden_layers=config.num_hidden_layers,
        num_experts=router.global_num_experts,
        top_k=router.top_k,
        k_max=config.k_max,
        renormalize=router.renormalize,
        **READERS[name](router),
    )
    _check_law(shape)
    return shape


def _check_law(shape: RouterShape) -> None:
    """Refuse what the routing law does not describe."""
    if shape.scoring not in SCORINGS:
        raise UnsupportedModelError.because(
            f"the routers score by {shape.scoring}, expected one of {SCORINGS}"
        )
    # vLLM's own routers fall back to other rules here, or fail
    groups = shape.num_expert_group
    even = groups >= 1 and shape.num_experts % groups == 0
    if not even or shape.num_experts == groups or not 1 <= shape.topk_group <= groups:
        raise UnsupportedModelError.because(
            f"{shape.num_experts} experts in {groups} groups, {shape.topk_group} of "
            "them used, is no grouping that vLLM's routers follow"
        )


def _plain(router: Any) -> dict[str, Any]:
    return {"scoring": router.scoring_func}


def _biased(router: Any) -> dict[str, Any]:
    return {
        "scoring": router.scoring_func,
        "has_correction_bias": correction_bias(router) is not None,
        "routed_scaling_factor": router.routed_scaling_factor,
    }


def _grouped(router: Any) -> dict[str, Any]:
    return {
        **_biased(router),
        "num_expert_group": router.num_expert_group,
        "topk_group": router.topk_group,
    }


def _refuse_if(holds: Any, reason: str) -> None:
    if holds:
        raise UnsupportedModelError.because(reason)


def _read_grouped(router: Any) -> dict[str, Any]:
    _refuse_if(router.num_fused_shared_experts, FUSED)
    return _grouped(router)


def _read_biased(router: Any) -> dict[str, Any]:
    _refuse_if(router._hash_indices_table is not None, HASHED)
    _refuse_if(router.num_fused_shared_experts, FUSED)
    _refuse_if(router.bias_vl is not None, "image tokens have a bias of their own")
    return _biased(router)


def _read_cpu(router: Any) -> dict[str, Any]:
    """Read the one class that vLLM routes all families by on CPU."""
    _refuse_if(router.custom_routing_function is not None, OWN_FUNCTION)
    _refuse_if(router._hash_indices_table is not None, HASHED)
    if router.use_grouped_topk:
        return _grouped(router)
    extras = correction_bias(router) is not None or router.routed_scaling_factor != 1.0
    _refuse_if(
        extras or router.scoring_func != "softmax",
        "vLLM's CPU router follows ungrouped experts by plain softmax scores only, and "
        "leaves out this model's scoring, correction bias or scaling factor",
    )
    return _plain(router)


# exact class names: a subclass may route otherwise
READERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "CPURouter": _read_cpu,
    "FusedTopKBiasRouter": _read_biased,
    "FusedTopKRouter": _plain,
    "GroupedTopKRouter": _read_grouped,
}
REFUSED: dict[str, str] = {
    "AiterSharedRoutedFusedMoERouter": FUSED,
    "CustomRoutingRouter": OWN_FUNCTION,
    "RoutingSimulatorRouter": "routing is simulated, the routers' logits are not used",
    "ZeroExpertRouter": "some experts are no experts but pass the token on",
}
