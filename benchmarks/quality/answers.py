# SPDX-License-Identifier: Apache-2.0
"""The answer in a generated text, and the answer of several texts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

# lm-evaluation-harness, task gsm8k: "strict-match" and "flexible-extract"
STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
ANSWER_IS = re.compile(r"answer is:?\s*(yes|no|true|false)\b", re.IGNORECASE)
FIRST_WORD = re.compile(r"^\W*(yes|no|true|false)\b", re.IGNORECASE)
TRUTH = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}


def final_number(text: str) -> str | None:
    """Return the number that a GSM8K answer ends in, or `None`.

    What follows the first "####", as the data set writes its own answers; where there
    is none, the last number of the text. Dollar signs, thousands separators and a final
    full stop are dropped, and so are decimals that are all zero.

    Source: task `gsm8k` of lm-evaluation-harness.
    Differs: its two filters are reported apart there; here the second fills in.
    """
    strict = STRICT.search(text)
    found = strict[1] if strict else (NUMBER.findall(text) or [None])[-1]
    if found is None:
        return None
    plain = found.replace("$", "").replace(",", "").rstrip(".")
    return re.sub(r"\.0+$", "", plain) or None


def yes_or_no(text: str) -> str | None:
    """Return "yes" or "no", or `None`.

    What follows the last "answer is", as few-shot prompts for StrategyQA end; where
    there is none, the first word of the text.
    """
    stated = ANSWER_IS.findall(text)
    first = FIRST_WORD.match(text)
    found = stated[-1] if stated else (first[1] if first else None)
    return None if found is None else TRUTH[found.lower()]


def majority(answers: Sequence[str | None]) -> str | None:
    """Return the most frequent answer, the first of equals; texts without one abstain.

    Source: self-consistency, arXiv 2203.11171.
    """
    given = [answer for answer in answers if answer is not None]
    return Counter(given).most_common(1)[0][0] if given else None
