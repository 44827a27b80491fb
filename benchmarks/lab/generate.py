# SPDX-License-Identifier: Apache-2.0
"""Greedy texts of many prompts at once, by transformers."""

from collections.abc import Sequence

import torch
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

LOOK_EVERY = 16  # tokens between two looks for a stop string


class AllStopped(StoppingCriteria):
    """Ends the rows that hold a stop string; looked for now and then, since it costs.

    Args:
        tokenizer: of the model.
        start: length of the padded prompts, in tokens.
        stop: the strings.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, start: int, stop: Sequence[str]
    ):
        self.tokenizer, self.start, self.stop = tokenizer, start, stop

    def __call__(self, input_ids: torch.Tensor, scores, **_) -> torch.Tensor:
        ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        written = input_ids[:, self.start :]
        if written.shape[1] % LOOK_EVERY:
            return ended
        texts = self.tokenizer.batch_decode(written)
        found = [any(mark in text for mark in self.stop) for text in texts]
        return ended | torch.tensor(found, device=input_ids.device)


def cut(text: str, stop: Sequence[str]) -> str:
    """The text before its first stop string."""
    ends = [text.index(mark) for mark in stop if mark in text]
    return text[: min(ends)] if ends else text


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    stop: Sequence[str],
    max_tokens: int,
    batch: int,
) -> list[str]:
    """Continues each prompt greedily.

    Args:
        model: on the device it is to run on.
        tokenizer: its tokenizer; padding is set to the left.
        prompts: in any order; those of like length share a batch.
        stop: strings that end a text, and are not part of it.
        max_tokens: of a text.
        batch: prompts at once.

    Returns:
        The texts, in the order of the prompts.
    """
    tokenizer.padding_side = "left"
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    for start in tqdm(range(0, len(order), batch), "batches"):
        rows = order[start : start + batch]
        asked = tokenizer([prompts[i] for i in rows], return_tensors="pt", padding=True)
        asked = asked.to(model.device)
        length = asked["input_ids"].shape[1]
        ends = StoppingCriteriaList([AllStopped(tokenizer, length, stop)])
        written = model.generate(
            input_ids=asked["input_ids"],
            attention_mask=asked["attention_mask"],
            max_new_tokens=max_tokens,
            do_sample=False,
            stopping_criteria=ends,
        )[:, length:]
        decoded = tokenizer.batch_decode(written, skip_special_tokens=True)
        for row, text in zip(rows, decoded, strict=True):
            texts[row] = cut(text, stop)
    return texts
