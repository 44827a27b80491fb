# SPDX-License-Identifier: Apache-2.0
"""What the arms share of a few questions: own routing, neighbours, cached layers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from benchmarks.quality.packing import Encoded, encode
from benchmarks.quality.remix.likelihoods import OverriddenQuestions, prompt_of
from benchmarks.quality.remix.study import Study
from benchmarks.quality.tasks.question import ChoiceQuestion
from moe_tta.adapter import Neighbour, NeighbourTail, last_row_routing
from moe_tta.remix.embed import unit
from moe_tta.remix.lookup import LookUp
from moe_tta.remix.offline import borrow
from moe_tta.remix.questions import Question
from moe_tta.remix.updates import Borrowed, regress


@dataclass(frozen=True)
class Group:
    """References of Q questions: K of each.

    Attributes:
        study: What all batches share.
        borrowed: Rows, weights and pathways, by question.
    """

    study: Study
    borrowed: tuple[Borrowed, ...]

    @cached_property
    def questions(self) -> list[list[Question]]:
        """The references' texts, nearest first, by question."""
        store = self.study.store
        return [[store.question(int(r)) for r in one.rows] for one in self.borrowed]

    @cached_property
    def tail(self) -> NeighbourTail:
        """What the references' right answers cost under a given routing."""
        neighbours = []
        for owner, one in enumerate(self.borrowed):
            pairs = zip(self.questions[owner], one.weights.tolist(), strict=True)
            for question, weight in pairs:
                text = self._encode(question)
                start = text.starts[0]
                prompt, answer = text.sequences[0][:start], text.sequences[0][start:]
                neighbours.append(Neighbour(prompt, answer, weight, owner))
        return NeighbourTail(self.study.model, neighbours, self.study.layers)

    @cached_property
    def mean(self) -> torch.Tensor:
        """Weighted mean pathways [Q, layers, E] f32."""
        means = _tensor([regress(one) for one in self.borrowed])
        return means.to(self.study.model.device)

    def mean_at(self, share: float) -> torch.Tensor:
        """Return weighted mean routing [Q, layers, E] f32 of another prompt token.

        Args:
            share: Of a reference's prompt that stands before the token, below 1.
        """
        study = self.study
        places = [study.model.shape.layers.index(number) for number in study.layers]
        means = []
        for one, questions in zip(self.borrowed, self.questions, strict=True):
            prompts = [prompt_of(self._encode(question)) for question in questions]
            heads = [prompt[: int(share * len(prompt)) + 1] for prompt in prompts]
            routing = last_row_routing(study.model, heads)[:, places]
            weights = torch.from_numpy(one.weights).to(routing)
            means.append(torch.einsum("k,kle->le", weights, routing) / weights.sum())
        return torch.stack(means)

    def _encode(self, question: Question) -> Encoded:
        labelled = ChoiceQuestion("", (question.prompt,), (question.label,), 0)
        return encode(self.study.tokenizer, labelled)


@dataclass(frozen=True, eq=False)
class Batch:
    """Q questions.

    Attributes:
        study: What all batches share.
        questions: The questions.
    """

    study: Study
    questions: Sequence[ChoiceQuestion]

    @cached_property
    def encoded(self) -> list[Encoded]:
        """The questions in tokens."""
        return [encode(self.study.tokenizer, question) for question in self.questions]

    @cached_property
    def own(self) -> torch.Tensor:
        """The model's own routing [Q, layers, E] f32 of each last prompt token."""
        prompts = [prompt_of(question) for question in self.encoded]
        model = self.study.model
        places = [model.shape.layers.index(n) for n in self.study.layers]
        return last_row_routing(model, prompts)[:, places]

    @cached_property
    def choices(self) -> OverriddenQuestions:
        """What the choices score under a given routing."""
        return OverriddenQuestions(self.study.model, self.encoded, self.study.layers)

    @cached_property
    def labels(self) -> NeighbourTail:
        """What the questions' own right answers cost: for the oracle alone."""
        texts = []
        for owner, (question, text) in enumerate(
            zip(self.questions, self.encoded, strict=True)
        ):
            sequence, start = text.sequences[question.gold], text.starts[question.gold]
            texts.append(Neighbour(sequence[:start], sequence[start:], owner=owner))
        return NeighbourTail(self.study.model, texts, self.study.layers)

    @cached_property
    def nearest(self) -> Group:
        """Each question's neighbours by its text's embedding."""
        return self.neighbours(self.study.look_up)

    def neighbours(self, how: LookUp) -> Group:
        """Look each question's text up.

        Raises:
            ValueError: a question has fewer than `how.k` neighbours.
        """
        study = self.study
        texts = [question.contexts[0] for question in self.questions]
        vectors, _ = unit(study.embedder.embed_all(texts))
        found = tuple(
            borrow(study.store, vector, how, study.layers) for vector in vectors
        )
        if any(one is None or len(one.rows) < how.k for one in found):
            raise ValueError(
                f"expected {how.k} references for every question, the store "
                f"holds {len(study.store)}"
            )
        return Group(study, found)

    @cached_property
    def random(self) -> Group:
        """As many references drawn at random for each question, weighed alike."""
        study, k = self.study, self.study.look_up.k
        found = []
        for question in self.questions:
            digest = hashlib.sha256(question.id.encode()).digest()
            rng = np.random.default_rng([study.seed, *digest[:8]])
            rows = rng.choice(len(study.store), k, replace=False)
            pathways = study.store.pathways(rows, list(study.layers))
            # their similarities are not looked at
            found.append(Borrowed(rows, np.full(k, np.nan), np.ones(k), pathways))
        return Group(study, tuple(found))


def _tensor(distributions: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(distributions).astype(np.float32))
