# SPDX-License-Identifier: Apache-2.0
"""How far a GPU's answers may be from the reference in transformers."""

import math

import torch

from moe_tta.kernels.contrast import contrast_logits


def plan_alone(weak):
    """Return the request whose plan a contrast's weak stream obeys."""
    return {"dynamic_k": weak} if weak.keys() <= {"rank", "k"} else weak


def logprob_error(logits, tokens, logprobs):
    """Return the largest distance of reported logprobs from those of the logits."""
    chosen = torch.tensor(tokens)[:, None]
    want = logits.float().log_softmax(1).gather(1, chosen)[:, 0]
    return float((want - torch.tensor(logprobs)).abs().max())


def behind_best(logits, tokens):
    """Return how far each token's logit is below the best one, [len(tokens)]."""
    chosen = torch.tensor(tokens)[:, None]
    return logits.amax(1) - logits.gather(1, chosen)[:, 0]


def behind(strong, weak, beta, alpha, tokens, error):
    """Return how far each token is below the best of the combination, [len(tokens)].

    Whether a token is plausible may turn on an error of its own and one of the best
    token's: the kinder of both readings counts.
    """
    found = []
    for shift in (-2 * error, 0.0, 2 * error):
        out = contrast_logits(strong, weak, beta, min(1.0, alpha * math.exp(shift)))
        found.append(behind_best(out, tokens))
    return torch.stack(found).amin(0)
