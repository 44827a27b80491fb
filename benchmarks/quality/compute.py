# SPDX-License-Identifier: Apache-2.0
"""What answers cost: tokens, and the adapter's work."""

from __future__ import annotations

from typing import Any

HEAD = (
    *("task", "arm", "n", "accuracy", "prompt tokens", "generated", "cut off"),
    *("rounds", "tokens x steps", "adapter, ms", "loss fell", "loss before, after"),
)


def compute_table(results: list[dict[str, Any]], role: str = "test") -> list[str]:
    """Return the lines of a Markdown table of what each arm's answers took.

    Tokens, rounds and milliseconds are means of a question, all of its samples
    together; "loss fell" is the share of adapted rounds.

    Args:
        results: As read; of generated answers.
        role: `test` or `tune`.

    Raises:
        ValueError: a result does not say.
    """
    lines = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    for result in results:
        for arm in result[role]["arms"]:
            if "samples" not in arm:
                raise ValueError(f"the result of {result['task']} has no compute")
            cells = [result["task"], *_tokens(arm), *_rounds(arm)]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _tokens(arm: dict[str, Any]) -> list[str]:
    prompt = arm["mean_prompt_tokens"]
    return [
        arm["name"],
        str(arm["n"]),
        f"{arm['accuracy']:.3f}",
        "" if prompt is None else f"{arm['samples'] * prompt:.1f}",
        f"{arm['samples'] * arm['mean_tokens']:.1f}",
        f"{arm['cut_off']:.2f}",
    ]


def _rounds(arm: dict[str, Any]) -> list[str]:
    if "rounds" not in arm:
        return [""] * 5
    found, samples = arm["rounds"], arm["samples"]
    cells = [
        f"{sum(found['outcomes'].values()) / found['texts'] * samples:.2f}",
        f"{samples * found['token_steps']:.0f}",
        f"{samples * found['milliseconds']:.0f}",
    ]
    if not found["rounds"]:
        return [*cells, "", ""]
    losses = f"{found['before']:.4f}, {found['after']:.4f}"
    return [*cells, f"{100 * found['fallen']:.1f} % of {found['rounds']}", losses]
