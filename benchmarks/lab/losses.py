# SPDX-License-Identifier: Apache-2.0
"""Losses over a large vocabulary, a few thousand tokens' logits at a time."""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

CHUNK = 2048  # tokens; at 152 thousand words their float32 logits take 1.2 GB


def _summed(
    head: torch.Tensor,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    teacher: torch.Tensor | None,
) -> torch.Tensor:
    log_probs = F.linear(hidden, head).float().log_softmax(-1)
    entropy = F.nll_loss(log_probs, targets, reduction="sum")
    if teacher is None:
        return torch.stack([entropy, torch.zeros_like(entropy)])
    wanted = F.linear(teacher, head).float().log_softmax(-1)
    divergence = F.kl_div(log_probs, wanted, reduction="sum", log_target=True)
    return torch.stack([entropy, divergence])


def token_losses(
    head: torch.Tensor,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    teacher: torch.Tensor | None = None,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """Cross-entropy and divergence from a teacher, both the mean over tokens in nats.

    Logits are computed again in the backward pass rather than kept.

    Args:
        head: output embedding, [vocabulary, hidden_size].
        hidden: last hidden states, [tokens, hidden_size].
        targets: the tokens that follow, [tokens].
        teacher: last hidden states of the model that is not to be left, as `hidden`;
            the divergence is KL(teacher || model), zero where there is none.
        chunk: tokens whose logits are in memory.

    Returns:
        [2]: cross-entropy and divergence.
    """
    parts, total = hidden.split(chunk), torch.zeros(2, device=hidden.device)
    teachers = [None] * len(parts) if teacher is None else teacher.split(chunk)
    for part, wanted, like in zip(parts, targets.split(chunk), teachers, strict=True):
        total = total + checkpoint(
            _summed, head, part, wanted, like, use_reentrant=False
        )
    return total / len(hidden)


def last_hidden(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """States that predict all tokens but the first, [batch * (window - 1), hidden]."""
    states = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    return states[:, :-1].flatten(0, 1)


def window_loss(
    model: PreTrainedModel, tokens: torch.Tensor, teacher: torch.Tensor | None = None
) -> torch.Tensor:
    """`token_losses` of [batch, window] tokens."""
    head = model.get_output_embeddings().weight
    hidden = last_hidden(model, tokens)
    return token_losses(head, hidden, tokens[:, 1:].flatten(), teacher)
