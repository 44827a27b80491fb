# SPDX-License-Identifier: Apache-2.0
"""Log-likelihood of choices by vLLM's prompt log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tokenizers import Tokenizer

from benchmarks.quality.arms import Arm
from benchmarks.quality.engine import Engine, sampling_params
from benchmarks.quality.packing import Encoded, encode
from benchmarks.quality.tasks.question import ChoiceQuestion

IN_FLIGHT = 64  # questions whose requests are in the engine at once


class PromptScores:
    """Scores choices in the engine, for arms of one stream.

    Args:
        engine: It reads context and choice as one prompt.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        folder = engine.options["model"]
        self.tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")

    def score(
        self, questions: Sequence[ChoiceQuestion], arms: Sequence[Arm]
    ) -> Iterator[tuple[int, dict[Arm, list[float]]]]:
        """Score questions, some at a time.

        Yields:
            Index of a question, and for each arm the summed log-likelihood, in nats,
            of its choices.
        """
        for start in range(0, len(questions), IN_FLIGHT):
            some = [encode(self.tokenizer, q) for q in questions[start:][:IN_FLIGHT]]
            for place, scores in enumerate(self._score(some, arms)):
                yield start + place, scores

    def _score(
        self, questions: Sequence[Encoded], arms: Sequence[Arm]
    ) -> list[dict[Arm, list[float]]]:
        keys, requests = [], []
        for place, question in enumerate(questions):
            for arm in arms:
                params = sampling_params(arm, max_tokens=1, prompt_logprobs=0)
                for choice, sequence in enumerate(question.sequences):
                    keys.append((place, arm, choice))
                    requests.append(({"prompt_token_ids": list(sequence)}, params))
        found = [{arm: [0.0] * len(q.sequences) for arm in arms} for q in questions]
        for index, output in self.engine.run(requests):
            place, arm, choice = keys[index]
            begin = questions[place].starts[choice]
            pairs = zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
            answer = list(pairs)[begin:]
            found[place][arm][choice] = sum(at[token].logprob for token, at in answer)
        return found
