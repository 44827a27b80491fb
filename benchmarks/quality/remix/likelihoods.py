# SPDX-License-Identifier: Apache-2.0
"""Log-likelihood of choices, by the adapter: plain, or under a row's given routing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from benchmarks.quality.packing import Encoded, pack, sums_by_choice
from moe_tta.adapter import AdapterModel, Neighbour, NeighbourTail
from moe_tta.adapter.loss import token_nll
from moe_tta.adapter.routing import LayerEdit

PACK_TOKENS = {"cpu": 512, "cuda": 4096}  # attention is quadratic in these

Scores = list[list[float]]  # nats, by question and choice


def prompt_of(question: Encoded) -> list[int]:
    """Return the tokens that stand before every choice.

    Raises:
        ValueError: they are not the same for all choices.
    """
    pairs = zip(question.sequences, question.starts, strict=True)
    prompts = {sequence[:start] for sequence, start in pairs}
    if len(prompts) > 1:
        raise ValueError("expected one prompt for all choices of a question")
    return list(prompts.pop())


@torch.no_grad()
def plain_log_likelihoods(model: AdapterModel, questions: Sequence[Encoded]) -> Scores:
    """Score questions under the model's own routing, in one packed pass.

    Raises:
        ValueError: the model attends within a window, which packing does not know.
    """
    return _packed_log_likelihoods(model, questions, {})


@torch.no_grad()
def log_likelihoods_from_last_prompt_token(
    model: AdapterModel,
    questions: Sequence[Encoded],
    layers: Sequence[int],
    omega: torch.Tensor,
) -> Scores:
    """Score questions where the answers' tokens get the given distributions too.

    Source: C3PO's released code (arXiv 2504.07964), which overrides the last position
    of every call; the request's span "last_prompt+generated".

    Args:
        model: The adapter.
        questions: Q of them, each with one prompt.
        layers: Decoder layers whose distribution is given.
        omega: [Q, len(layers), E] f32.
    """
    spans = [(len(prompt_of(one)) - 1, one.num_tokens) for one in questions]
    return _log_likelihoods_within(model, questions, spans, layers, omega)


@torch.no_grad()
def log_likelihoods_at(
    model: AdapterModel,
    questions: Sequence[Encoded],
    places: Sequence[int],
    layers: Sequence[int],
    omega: torch.Tensor,
) -> Scores:
    """Score questions where one token of each prompt gets the given distributions.

    Args:
        model: The adapter.
        questions: Q of them, each with one prompt.
        places: That token's position in each prompt.
        layers: Decoder layers whose distribution is given.
        omega: [Q, len(layers), E] f32.
    """
    spans = [(place, place + 1) for place in places]
    return _log_likelihoods_within(model, questions, spans, layers, omega)


def _log_likelihoods_within(
    model: AdapterModel,
    questions: Sequence[Encoded],
    spans: Sequence[tuple[int, int]],
    layers: Sequence[int],
    omega: torch.Tensor,
) -> Scores:
    """Score questions; a span counts a question's packed tokens, prompt first."""
    slots = []
    for number, (question, (first, end)) in enumerate(
        zip(questions, spans, strict=True), start=1
    ):
        after = question.num_tokens - end
        slots += [0] * first + [number] * (end - first) + [0] * after
    rows = torch.tensor(slots, device=model.device)
    edits = {
        number: LayerEdit(rows, target=omega[:, index])
        for index, number in enumerate(layers)
    }
    return _packed_log_likelihoods(model, questions, edits)


def _packed_log_likelihoods(
    model: AdapterModel, questions: Sequence[Encoded], edits: Mapping[int, LayerEdit]
) -> Scores:
    if getattr(model.config, "sliding_window", None):
        raise ValueError("expected a model without sliding-window attention")
    packed = pack(questions)
    hidden = model.embed(packed.tokens.to(model.device))
    positions = packed.positions.to(model.device)
    shared = model.shared(hidden, positions, packed.visible.to(model.device))
    hidden = model.run(hidden, range(model.config.num_hidden_layers), shared, edits)
    rows = hidden[0, packed.predictors.to(model.device)]
    nll = token_nll(model, rows, packed.targets.to(model.device))
    return _by_question(sums_by_choice(-nll, packed), packed.sizes)


class OverriddenQuestions:
    """Q questions with all choices, cached up to what the last prompt token changes.

    Each choice is, to the adapter, an answer to the same prompt; its own tokens keep
    the model's routing.

    Args:
        model: The adapter.
        questions: Q of them, each with one prompt.
        layers: Decoder layers whose distribution is given.
    """

    def __init__(
        self, model: AdapterModel, questions: Sequence[Encoded], layers: Sequence[int]
    ):
        texts = [
            Neighbour(sequence[:start], sequence[start:], owner=owner)
            for owner, question in enumerate(questions)
            for sequence, start in zip(question.sequences, question.starts, strict=True)
        ]
        self._tail = NeighbourTail(model, texts, layers)
        self._num_tokens = torch.tensor([len(text.answer) for text in texts])
        self._sizes = [len(question.sequences) for question in questions]

    @torch.no_grad()
    def log_likelihoods(self, omega: torch.Tensor) -> Scores:
        """Score the choices.

        Args:
            omega: [Q, len(layers), E] f32, distributions for each question's last
                prompt token.
        """
        means = self._tail.nll(omega).double().cpu()
        return _by_question((-means * self._num_tokens).tolist(), self._sizes)


def _by_question(sums: list[float], sizes: Sequence[int]) -> Scores:
    rest = iter(sums)
    return [[next(rest) for _ in range(size)] for size in sizes]
