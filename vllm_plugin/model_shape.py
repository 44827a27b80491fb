# SPDX-License-Identifier: Apache-2.0
"""Router constants of a model, read twice: from its config and from its routers.

The API process knows the config only; the worker holds the routers. Both readings
must agree, or the engine does not start: a request checked against one shape must
never run on another.
"""

from __future__ import annotations

from typing import Any

from moe_tta.shape import RouterShape

# model_type -> what its vLLM model class passes to the router; None reads the config
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"renormalize": True},
    "olmoe": {"renormalize": False},
    "qwen2_moe": {},
    "qwen3_moe": {},
}


class UnsupportedModelError(ValueError):
    """The plugin cannot serve this model or set-up; the message says why."""


def shape_from_config(config: Any, k_max: int | None = None) -> RouterShape | None:
    """Read the router shape from a Hugging Face text config.

    Args:
        config: The model's text config.
        k_max: Engine option; `None` means the model's own top_k.

    Returns:
        The shape, or `None` when the model has no MoE layers.

    Raises:
        UnsupportedModelError: an MoE family this release does not know.
    """
    num_experts = _first(
        config, "num_experts", "num_local_experts", "n_routed_experts", default=0
    )
    if not num_experts or num_experts < 2:
        return None
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnsupportedModelError(
            f"moe-tta does not know the routers of model type {config.model_type!r}; "
            f"supported: {', '.join(sorted(FAMILIES))}. Set MOE_TTA_DISABLE=1 to serve "
            "it without moe-tta"
        )
    top_k = config.num_experts_per_tok
    width = top_k if k_max is None else k_max
    if not top_k <= width <= num_experts:
        raise UnsupportedModelError(
            f"moe_tta.k_max must lie in {top_k}..{num_experts} (the model's own top_k "
            f"and number of experts), got {width}"
        )
    return RouterShape(
        layers=tuple(_moe_layers(config)),
        num_hidden_layers=config.num_hidden_layers,
        num_experts=num_experts,
        top_k=top_k,
        k_max=width,
        renormalize=family.get("renormalize", getattr(config, "norm_topk_prob", None)),
    )


def _first(config: Any, *names: str, default: Any) -> Any:
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    return default


def _moe_layers(config: Any) -> list[int]:
    dense = set(getattr(config, "mlp_only_layers", None) or ())
    step = getattr(config, "decoder_sparse_step", None) or 1
    return [
        layer
        for layer in range(config.num_hidden_layers)
        if layer not in dense and (layer + 1) % step == 0
    ]


def shape_from_routers(runners: list[Any], config: RouterShape) -> RouterShape:
    """Read the router shape from the loaded model's MoE runners.

    Args:
        runners: vLLM's MoE runners in layer order.
        config: The shape read from the config, for what routers do not hold.

    Raises:
        UnsupportedModelError: a router of another kind, or routers that differ.
    """
    shapes = {_router_shape(runner, config) for runner in runners}
    if len(shapes) != 1:
        raise UnsupportedModelError("the MoE layers' routers differ from each other")
    (shape,) = shapes
    layers = tuple(runner.layer_id for runner in runners)
    return RouterShape(**{**shape.__dict__, "layers": layers})


def _router_shape(runner: Any, config: RouterShape) -> RouterShape:
    router = runner.router
    name = type(router).__name__
    if name not in ("CPURouter", "FusedTopKRouter"):
        raise UnsupportedModelError(f"routers of kind {name} are not supported yet")
    if getattr(router, "custom_routing_function", None) is not None:
        raise UnsupportedModelError("the model brings its own routing function")
    if getattr(router, "use_grouped_topk", False):
        raise UnsupportedModelError("grouped top-k routers are not supported yet")
    if router.scoring_func != "softmax":
        raise UnsupportedModelError(f"{router.scoring_func} routers are not supported")
    return RouterShape(
        layers=(),
        num_hidden_layers=config.num_hidden_layers,
        num_experts=router.global_num_experts,
        top_k=router.top_k,
        k_max=config.k_max,
        renormalize=router.renormalize,
    )
