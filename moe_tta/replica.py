# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face model that obeys routing plans: the end-to-end reference.

Slow and plain on purpose: one sequence, no cache, every layer's gate output replaced
by the oracle's. vLLM's results are checked against it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch

from moe_tta.kernels.recall import LayerMemory, recall_rows
from moe_tta.kernels.reference import RoutingRule, route
from moe_tta.kernels.table import PlanTable
from moe_tta.plan import RoutingPlan
from moe_tta.shape import RouterShape

# where a router's output holds router_logits, topk_weights, topk_ids
_ORDER = (0, 1, 2)
_ORDERS = {"GraniteMoeTopKRouter": (2, 1, 0)}


def gates(model: torch.nn.Module, num_experts: int) -> list[torch.nn.Module]:
    """Return the model's router modules in layer order.

    Raises:
        ValueError: the model has none of the form transformers 5 uses.
    """
    found = [
        module
        for name, module in model.named_modules()
        if name.endswith((".gate", ".router"))
        and getattr(module, "weight", None) is not None
        and module.weight.shape[0] == num_experts
    ]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no modules named 'gate' or 'router'"
        )
    return found


def _rule(gate: torch.nn.Module, shape: RouterShape) -> RoutingRule:
    # transformers scales weights where vLLM may scale the experts' output instead
    factor = getattr(gate, "routed_scaling_factor", shape.routed_scaling_factor)
    bias = getattr(gate, "e_score_correction_bias", None)
    return RoutingRule.from_shape(replace(shape, routed_scaling_factor=factor), bias)


def routed(
    model: torch.nn.Module,
    shape: RouterShape,
    segments: Sequence[RoutingPlan | None],
    prompt_len: int,
    start: int = 0,
    memories: Sequence[Sequence[LayerMemory | None]] = (),
) -> AbstractContextManager[list[dict[str, Any]]]:
    """Let forward passes of one sequence obey the plans of its segments.

    Args:
        model: A transformers MoE causal language model.
        shape: The model's router shape.
        segments: Plans of the prompt's body, its last token and generated tokens;
            `None` is the model's own rule.
        prompt_len: Number of prompt tokens.
        start: Position of each pass's first token; more than 0 with a KV cache.
        memories: Each layer's token memories by place, where plans name them.

    Returns:
        See `routed_rows`.
    """

    def plan_of(positions: torch.Tensor) -> torch.Tensor:
        return (positions >= prompt_len - 1).int() + (positions >= prompt_len)

    return routed_rows(model, shape, segments, plan_of, start, memories)


@contextmanager
def routed_rows(
    model: torch.nn.Module,
    shape: RouterShape,
    plans: Sequence[RoutingPlan | None],
    plan_of: Callable[[torch.Tensor], torch.Tensor],
    start: int = 0,
    memories: Sequence[Sequence[LayerMemory | None]] = (),
) -> Iterator[list[dict[str, Any]]]:
    """Let forward passes of one sequence obey a plan of their own in each row.

    Args:
        model: A transformers MoE causal language model.
        shape: The model's router shape.
        plans: `None` is the model's own rule.
        plan_of: Places in `plans`, [T] int, for absolute positions [T].
        start: Position of each pass's first token; more than 0 with a KV cache.
        memories: Each layer's token memories by place, where plans name them.

    Yields:
        A list that each forward pass fills with one record a layer: `router_logits`
        [T, E], `topk_weights` and `topk_ids` [T, k_max], `stock_ids` [T, top_k].
    """
    table = PlanTable(shape, len(plans), next(model.parameters()).device)
    given = [plan or RoutingPlan() for plan in plans]
    table.write(dict(enumerate(given, start=1)))
    records: list[dict[str, Any]] = []
    modules = gates(model, shape.num_experts)
    if len(modules) != len(shape.layers):
        raise ValueError(f"{len(modules)} gates found, expected {len(shape.layers)}")

    def hook(index: int):
        rule = _rule(modules[index], shape)
        order = _ORDERS.get(type(modules[index]).__name__, _ORDER)

        def replaced(module, inputs, output):
            logits, stock_weights, stock_ids = (output[place] for place in order)
            positions = torch.arange(
                start, start + logits.shape[0], device=logits.device
            )
            slots = 1 + plan_of(positions)
            recalled = None
            if memories:
                hidden = inputs[0].reshape(-1, inputs[0].shape[-1])
                layer = table.layer(index)
                recalled = recall_rows(hidden, slots.int(), layer, memories[index])
            weights, ids = route(
                logits.float(),
                slots.int(),
                positions,
                table.layer(index),
                rule,
                shape.k_max,
                shape.layers[index],
                recalled=recalled,
            )
            records.append(
                {
                    "router_logits": logits,
                    "topk_weights": weights,
                    "topk_ids": ids,
                    "stock_ids": stock_ids,
                }
            )
            parts = (logits, weights.to(stock_weights.dtype), ids.long())
            return tuple(part for _, part in sorted(zip(order, parts, strict=True)))

        return replaced

    handles = [m.register_forward_hook(hook(i)) for i, m in enumerate(modules)]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def logprobs(model: torch.nn.Module, token_ids: Sequence[int]) -> torch.Tensor:
    """Return log-probabilities [T, V] float32 of the next token at each position."""
    logits = model(torch.tensor([list(token_ids)])).logits[0]
    return torch.log_softmax(logits.float(), dim=-1)
