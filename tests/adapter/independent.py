# SPDX-License-Identifier: Apache-2.0
"""What the adapter must equal: plain transformers models with hooks at their gates.

Nothing of `moe_tta` is used: weights are loaded by transformers, the loss is
transformers' own or written out, and autograd goes through one unpadded sequence.
"""

from contextlib import contextmanager

import torch
from transformers import AutoModelForCausalLM


def load(path, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, experts_implementation="eager"
    )
    return model.eval().requires_grad_(False)


@contextmanager
def gates(model, distribution):
    """Let `distribution(layer, logits [T, E]) -> [T, E]` choose and weigh experts."""
    config, handles = model.config, []
    renormalize = config.model_type == "mixtral" or config.norm_topk_prob
    for number, layer in enumerate(model.model.layers):

        def hook(module, inputs, output, number=number):
            logits, weights, _ = output
            top, ids = distribution(number, logits.float()).topk(weights.shape[1])
            if renormalize:
                top = top / top.sum(dim=-1, keepdim=True)
            return logits, top.to(weights.dtype), ids

        handles.append(layer.mlp.gate.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def context_loss(model, tokens, delta):
    """Next-token cross-entropy with delta [L, E] added to every row's logits."""

    def shifted(number, logits):
        return torch.softmax(logits + delta[number], dim=-1)

    ids = torch.tensor([tokens])
    with gates(model, shifted):
        return model(ids, labels=ids).loss


def context_gradient(model, tokens, delta):
    leaf = delta.clone().requires_grad_()
    loss = context_loss(model, tokens, leaf)
    loss.backward()
    return loss.detach(), leaf.grad


def answer_loss(model, prompt, answer, layers, omega):
    """Mean NLL of the answer with the last prompt row routed by omega [layers, E]."""
    row = len(prompt) - 1

    def overridden(number, logits):
        plain = torch.softmax(logits, dim=-1)
        if number not in layers:
            return plain
        ours = omega[layers.index(number)][None]
        return torch.cat([plain[:row], ours, plain[row + 1 :]])

    with gates(model, overridden):
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0]
    logs = torch.log_softmax(logits.float(), dim=-1)[row:-1]
    return -logs.gather(1, torch.tensor(answer)[:, None]).mean()


def answer_gradient(model, prompt, answer, layers, omega):
    leaf = omega.clone().requires_grad_()
    loss = answer_loss(model, prompt, answer, layers, leaf)
    loss.backward()
    return loss.detach(), leaf.grad
