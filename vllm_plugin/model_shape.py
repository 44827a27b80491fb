# SPDX-License-Identifier: Apache-2.0
"""Router constants of a model as its config gives them.

The API process knows the config only; the worker holds the routers and reads them
again (`router_shape`). Both readings must agree, or the engine does not start: a
request checked against one shape must never run on another.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moe_tta.shape import RouterShape
from moe_tta.vllm_plugin.families import FAMILIES, REFUSED, count_experts

WAY_OUT = "Set MOE_TTA_DISABLE=1 to run this set-up without moe-tta"


class UnsupportedModelError(ValueError):
    """The plugin cannot serve this model or set-up; the message says why."""

    @classmethod
    def because(cls, reason: str) -> UnsupportedModelError:
        """Return the error that names a reason and the way out."""
        return cls(f"moe-tta refuses to start: {reason}. {WAY_OUT}")


def shape_from_config(config: Any, k_max: int | None = None) -> RouterShape | None:
    """Read the router shape from a Hugging Face text config.

    Args:
        config: The model's text config.
        k_max: Engine option; `None` means the model's own top_k.

    Returns:
        The shape, or `None` when the model has no MoE layers.

    Raises:
        UnsupportedModelError: an MoE family that this release does not know or cannot
            honour, or a config that leaves the routing open.
    """
    num_experts = count_experts(config)
    if num_experts < 2:
        return None
    name = config.model_type
    if name in REFUSED:
        raise UnsupportedModelError.because(REFUSED[name])
    if name not in FAMILIES:
        raise UnsupportedModelError.because(
            f"it does not know the routers of model type {name!r}; known: "
            + ", ".join(sorted(FAMILIES))
        )
    family = FAMILIES[name]
    layers = family.moe_layers(config)
    if not layers:
        return None
    fields = {field: reader(config) for field, reader in family.router.items()}
    unset = [field for field, value in fields.items() if value is None]
    if unset:
        raise UnsupportedModelError.because(
            f"the model's config leaves {', '.join(unset)} unset"
        )
    shape = RouterShape(
        layers=layers,
        num_hidden_layers=config.num_hidden_layers,
        num_experts=num_experts,
        top_k=config.num_experts_per_tok,
        k_max=config.num_experts_per_tok,
        **fields,
    )
    return shape if k_max is None else _widened(shape, k_max)


def _widened(shape: RouterShape, k_max: int) -> RouterShape:
    """Return the shape for an engine with this width, or refuse the width."""
    reach = shape.num_experts * shape.topk_group // shape.num_expert_group
    if not shape.top_k <= k_max <= reach:
        raise UnsupportedModelError(
            f"moe_tta.k_max must lie in {shape.top_k}..{reach} (the model's own top_k "
            f"and the experts that a token can be given), got {k_max}"
        )
    return replace(shape, k_max=k_max)
