# SPDX-License-Identifier: Apache-2.0
"""The answer in a solution of MATH, in a form that can be compared."""

from __future__ import annotations

import re

BOXED = re.compile(r"\\f?boxed\s*(?=\{)")
STATED = re.compile(r"answer is:?\s*(.+?)(?:\.\s|\.?$)", re.IGNORECASE | re.MULTILINE)
FORMULA = re.compile(r"\$([^$]+)\$")
# what changes how an answer looks and not what it is, in this order
NORMAL = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\\\\s*", r"\\\\"),  # rows of a matrix
        (r"\\(?:left|right|displaystyle)(?![a-zA-Z])", ""),
        # a unit after a number
        (r"(?<=[\d}\s])\\(?:text|mbox|mathrm)\{[^{}]*\}(?:\^\{?\d\}?)?\s*$", ""),
        (r"\\[!,;: ]|\\q?quad|~|\s|\\?\$|\\?%", ""),
        (r"\\[dt]frac", r"\\frac"),
        (r"\^\{?\\circ\}?|\\degree", ""),
        (r"\\(?:text|textbf|mbox|mathrm)\{([^{}]*)\}", r"\1"),
        (r"\\frac(\d)", r"\\frac{\1}"),
        (r"(\\frac\{[^{}]*\})(\d)", r"\1{\2}"),
        (r"\\sqrt(\w)", r"\\sqrt{\1}"),
        (r"(?<=\d),(?=\d{3}(?:\D|$))", ""),  # 1,000
        (r"^[a-zA-Z]=", ""),
        (r"(?<!\d)0?\.(?=\d)", "0."),
        (r"\.0*$", ""),
    )
)


def latex_answer(text: str) -> str | None:
    """Return the answer of a solution in LaTeX, normalised, or `None`.

    The content of the last box; where there is none, what follows the last "answer
    is"; else the last formula between dollar signs. Two answers count as equal if they
    are the same string after spacing, sizes, units after a number, and ways of writing
    fractions, roots and thousands were made one. No algebra is done: an equal answer in
    another form is counted wrong.
    """
    found = (
        _boxed(text) or (STATED.findall(text) or FORMULA.findall(text) or [None])[-1]
    )
    return None if found is None else normal(found) or None


def normal(answer: str) -> str:
    """Return an answer without what does not change its meaning."""
    for pattern, replacement in NORMAL:
        answer = pattern.sub(replacement, answer)
    return answer


def _boxed(text: str) -> str | None:
    starts = [match.end() for match in BOXED.finditer(text)]
    if not starts:
        return None
    depth, begin = 0, starts[-1]
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return text[begin + 1 : place]
    return None  # cut off inside the box
