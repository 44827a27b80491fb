# SPDX-License-Identifier: Apache-2.0
"""Model families: where each one's config says how its routers work.

A row repeats what the family's model class in vLLM passes to its routers. Models that
scale the experts' output by `routed_scaling_factor` (DeepSeek, GLM) give their routers
the factor 1, and so do the rows here.

Source: `vllm/model_executor/models` of vLLM 0.32.0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Reader = Callable[[Any], Any]


def fixed(value: Any) -> Reader:
    """Return a reader of what the model class sets for every model."""
    return lambda config: value


def read(name: str, *default: Any) -> Reader:
    """Return a reader of a config attribute, with a default where it may be missing."""
    return lambda config: getattr(config, name, *default)


@dataclass(frozen=True)
class Family:
    """One `model_type`.

    Attributes:
        num_experts: Config attribute with the number of routed experts.
        moe_layers: Reader of the decoder layers that have experts, ascending.
        router: Readers of `RouterShape` fields; a field not named keeps its default.
    """

    num_experts: str
    moe_layers: Reader
    router: Mapping[str, Reader] = field(default_factory=dict)


def _every_layer(config: Any) -> tuple[int, ...]:
    return tuple(range(config.num_hidden_layers))


def _qwen_layers(config: Any) -> tuple[int, ...]:
    dense = getattr(config, "mlp_only_layers", [])
    step = config.decoder_sparse_step
    layers = range(config.num_hidden_layers)
    return tuple(i for i in layers if i not in dense and (i + 1) % step == 0)


def _glm_layers(config: Any) -> tuple[int, ...]:
    return tuple(range(config.first_k_dense_replace, config.num_hidden_layers))


def _deepseek_layers(config: Any) -> tuple[int, ...]:
    step = getattr(config, "moe_layer_freq", 1)
    return tuple(i for i in _glm_layers(config) if i % step == 0)


_QWEN = Family("num_experts", _qwen_layers, {"renormalize": read("norm_topk_prob")})
_RENORMALIZED = Family("num_local_experts", _every_layer, {"renormalize": fixed(True)})
_DEEPSEEK = Family(
    "n_routed_experts",
    _deepseek_layers,
    {
        "scoring": read("scoring_func", "softmax"),
        "renormalize": read("norm_topk_prob"),
        "num_expert_group": read("n_group", 1),
        "topk_group": read("topk_group", 1),
        "has_correction_bias": lambda config: (
            getattr(config, "topk_method", None) == "noaux_tc"
        ),
    },
)

FAMILIES: dict[str, Family] = {
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "glm4_moe": Family(
        "n_routed_experts",
        _glm_layers,
        {
            "scoring": fixed("sigmoid"),
            "renormalize": read("norm_topk_prob"),
            "num_expert_group": read("n_group"),
            "topk_group": read("topk_group"),
            "has_correction_bias": fixed(True),
        },
    ),
    # top-k, then softmax: the same as softmax, top-k, renormalisation
    "gpt_oss": _RENORMALIZED,
    "granitemoe": _RENORMALIZED,
    "mixtral": _RENORMALIZED,
    "olmoe": Family("num_experts", _every_layer, {"renormalize": fixed(False)}),
    "qwen2_moe": _QWEN,
    "qwen3_moe": _QWEN,
}

# known, and why no plan can be honoured
REFUSED: dict[str, str] = {
    "phimoe": (
        "PhiMoE routes by sparsemixer, which weighs each of its two experts against "
        "another set of near rivals; a plan has no such weights"
    ),
}

# how configs of any family name their number of experts
_EXPERT_COUNTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
)


def count_experts(config: Any) -> int:
    """Return a layer's routed experts, 0 where the config names none."""
    family = FAMILIES.get(config.model_type)
    names = (family.num_experts,) if family else _EXPERT_COUNTS
    values = [getattr(config, name, None) for name in names]
    return max((value for value in values if isinstance(value, int)), default=0)
