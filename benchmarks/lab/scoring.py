# SPDX-License-Identifier: Apache-2.0
"""Scores a causal language model: multiple choice by log-likelihood, perplexity."""

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from benchmarks.lab.tasks import Question

BATCH_TOKENS = {"cuda": 32_768, "cpu": 2_048}
RESAMPLES = 5_000


def _log_probs(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probability of each token after its first, float32 [rows, length - 1]."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    flat = F.cross_entropy(
        logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none"
    )
    return -flat.view(len(tokens), -1)


def _batches(lengths: list[int], budget: int):
    """Groups rows of like length so that a padded batch holds `budget` tokens."""
    batch = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[row] > budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


@torch.inference_mode()
def answer_scores(
    model: PreTrainedModel, tokenizer: Tokenizer, pairs: list[tuple[str, str]]
) -> np.ndarray:
    """Summed log-likelihood, in nats, of each answer after its context.

    Padding is on the right, where a causal model cannot see it.

    Args:
        pairs: (context, answer); the two are joined by one space.
    """
    whole = [tokenizer.encode(f"{context} {answer}").ids for context, answer in pairs]
    starts = [len(tokenizer.encode(context).ids) for context, _ in pairs]
    scores = np.zeros(len(pairs))
    budget = BATCH_TOKENS[model.device.type]
    for rows in _batches([len(ids) for ids in whole], budget):
        tokens = torch.zeros(len(rows), len(whole[rows[-1]]), dtype=torch.long)
        for i, row in enumerate(rows):
            tokens[i, : len(whole[row])] = torch.tensor(whole[row])
        log_probs = _log_probs(model, tokens.to(model.device)).cpu().double()
        for i, row in enumerate(rows):
            answer = slice(starts[row] - 1, len(whole[row]) - 1)
            scores[row] = log_probs[i, answer].sum()
    return scores


def correct(
    model: PreTrainedModel, tokenizer: Tokenizer, questions: list[Question]
) -> dict[str, np.ndarray]:
    """Whether each question is answered right, by normalisation.

    Returns:
        ``raw`` (summed log-likelihood) and ``per_char`` (divided by the answer's
        length in characters), bool [questions].
    """
    pairs = [(q.context, choice) for q in questions for choice in q.choices]
    scores = answer_scores(model, tokenizer, pairs)
    lengths = np.array([max(1, len(answer)) for _, answer in pairs])
    ends = np.cumsum([len(q.choices) for q in questions])[:-1]
    gold = np.array([q.gold for q in questions])
    right = {}
    for name, values in (("raw", scores), ("per_char", scores / lengths)):
        best = np.array([part.argmax() for part in np.split(values, ends)])
        right[name] = best == gold
    return right


@torch.inference_mode()
def window_losses(model: PreTrainedModel, windows: torch.Tensor) -> np.ndarray:
    """Mean next-token loss, in nats, of each window; [windows]."""
    rows = max(1, BATCH_TOKENS[model.device.type] // windows.shape[1])
    parts = [_log_probs(model, w.to(model.device)) for w in windows.split(rows)]
    return -torch.cat(parts).double().mean(1).cpu().numpy()


def bootstrap(values: np.ndarray, statistic=np.mean, seed: int = 0) -> dict:
    """A mean and its 95 % percentile-bootstrap interval over rows.

    For a paired comparison, pass the differences of the pairs.

    Args:
        values: [rows].
        statistic: applied along the last axis.
    """
    rng = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        means[i] = statistic(values[rng.integers(0, len(values), len(values))])
    low, high = np.quantile(means, (0.025, 0.975))
    return {"mean": float(statistic(values)), "low": float(low), "high": float(high)}
