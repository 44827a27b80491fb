# SPDX-License-Identifier: Apache-2.0
"""Model families whose served weights the adapter can differentiate through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moe_tta.adapter.errors import AdapterError
from moe_tta.shape import RouterShape


@dataclass(frozen=True)
class Family:
    """Names under which checkpoints and vLLM hold what transformers calls `mlp`.

    Attributes:
        block: The MoE block of a decoder layer.
        gate: An expert's gate matrix [I, H] in checkpoints.
        up: Its up matrix [I, H].
        down: Its down matrix [H, I].
    """

    block: str
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


FAMILIES = {
    "mixtral": Family("block_sparse_moe", "w1", "w3", "w2"),
    "olmoe": Family("mlp"),
    "qwen2_moe": Family("mlp"),
    "qwen3_moe": Family("mlp"),
}

# what vLLM computes in these families, whatever the config says
WRITTEN_IN_CODE = {
    "olmoe": {"clip_qkv": None, "attention_bias": False, "rms_norm_eps": 1e-5},
    "qwen2_moe": {"qkv_bias": True, "use_sliding_window": False},
}


def family_of(config: Any) -> Family:
    """Return the family of a transformers config.

    Raises:
        AdapterError: the family is not known, the model is quantised, or its config
            asks for what vLLM 0.32 does not compute.
    """
    if config.model_type not in FAMILIES:
        raise AdapterError(
            f"the adapter cannot take gradients through {config.model_type!r} models; "
            f"it knows {', '.join(sorted(FAMILIES))}"
        )
    if getattr(config, "quantization_config", None):
        raise AdapterError(
            "the adapter cannot take gradients through quantised weights; serve the "
            "unquantised checkpoint"
        )
    _refuse_other_values(config)
    return FAMILIES[config.model_type]


def _refuse_other_values(config: Any) -> None:
    for name, value in WRITTEN_IN_CODE.get(config.model_type, {}).items():
        if (asked := getattr(config, name, value)) != value:
            raise AdapterError(
                f"the config asks for {name} = {asked}, but vLLM serves "
                f"{config.model_type!r} with {value}: gradients would be those of "
                "another model"
            )


def attention_window(config: Any) -> int | None:
    """Return how many tokens a row attends to; `None` for all before it."""
    return getattr(config, "sliding_window", None) or None  # Qwen2-MoE says 0 for all


def router_shape(config: Any) -> RouterShape:
    """Return the router constants of a supported config; `k_max` is its `top_k`."""
    count = config.num_hidden_layers
    layers = tuple(range(count))
    if hasattr(config, "decoder_sparse_step"):  # Qwen2-MoE and Qwen3-MoE
        step, dense = config.decoder_sparse_step, config.mlp_only_layers
        layers = tuple(n for n in layers if n not in dense and (n + 1) % step == 0)
    top_k = config.num_experts_per_tok
    return RouterShape(
        layers=layers,
        num_hidden_layers=count,
        num_experts=getattr(config, "num_experts", None) or config.num_local_experts,
        top_k=top_k,
        k_max=top_k,
        renormalize=config.model_type == "mixtral" or config.norm_topk_prob,
    )
