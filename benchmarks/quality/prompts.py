# SPDX-License-Identifier: Apache-2.0
"""What the model continues, and whether there is room to."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.quality.arms import Arm
from benchmarks.quality.tasks.question import TextQuestion, worked


def prompt(arm: Arm, question: TextQuestion) -> str:
    """Return what the model continues."""
    return worked(arm.examples) + question.prompt


def check_lengths(
    asked: Sequence[tuple[Arm, TextQuestion]], args: argparse.Namespace
) -> None:
    """Refuse prompts that vLLM would refuse, with all of a run's work before it.

    Args:
        asked: Who is asked what; at least one.
        args: The shared options.

    Raises:
        ValueError: no token can follow the longest prompt.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompts = [prompt(arm, question) for arm, question in asked]
    lengths = [len(ids) for ids in tokenizer(prompts)["input_ids"]]
    longest = max(lengths)
    if longest >= args.max_model_len:
        arm, question = asked[lengths.index(longest)]
        raise ValueError(
            f"expected --max-model-len above {longest}, the tokens of question "
            f"{question.id} for arm {arm.name!r}, got {args.max_model_len}"
        )
