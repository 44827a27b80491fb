# SPDX-License-Identifier: Apache-2.0
"""Replaces an MoE model's routing while it runs, and counts where tokens went."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter

# both normalise over the chosen experts as the lab's models are configured
ROUTERS = (MixtralTopKRouter, Qwen2MoeTopKRouter)
ROUTINGS = ("learned", "random", "inverted")


def reroute(
    router_logits: torch.Tensor, routing: str, generator: torch.Generator
) -> torch.Tensor:
    """Learned logits as they are, negated, or replaced by standard normal noise.

    Args:
        router_logits: [tokens, experts].
    """
    if routing == "random":
        noise = torch.randn(router_logits.shape, generator=generator)
        return noise.to(router_logits)
    return -router_logits if routing == "inverted" else router_logits


@contextmanager
def routed(
    model: PreTrainedModel, routing: str, top_k: int, seed: int = 0
) -> Iterator[torch.Tensor]:
    """Within the context, every layer routes as told, with `top_k` experts a token.

    Args:
        routing: one of `ROUTINGS`.

    Yields:
        Counts of the tokens sent to each expert, int64 [layers, experts], filled as
        the model runs.
    """
    if routing not in ROUTINGS:
        raise ValueError(f"unknown routing {routing}; one of {', '.join(ROUTINGS)}")
    gates = [m for m in model.modules() if isinstance(m, ROUTERS)]
    load = torch.zeros(len(gates), gates[0].num_experts, dtype=torch.long)
    generator = torch.Generator().manual_seed(seed)

    def hook_for(layer: int):
        def hook(gate, inputs, outputs):
            logits = reroute(outputs[0], routing, generator)
            weights, experts = logits.float().softmax(-1).topk(top_k, dim=-1)
            counts = experts.flatten().bincount(minlength=load.shape[1])
            load[layer] += counts.cpu()
            weights = (weights / weights.sum(-1, keepdim=True)).to(outputs[1].dtype)
            return logits, weights, experts

        return hook

    handles = [g.register_forward_hook(hook_for(i)) for i, g in enumerate(gates)]
    try:
        yield load
    finally:
        for handle in handles:
            handle.remove()
