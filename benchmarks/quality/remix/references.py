# SPDX-License-Identifier: Apache-2.0
"""Reference stores of the other data sets' questions that the model answers right."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from benchmarks.quality.packing import Encoded, encode, packs
from benchmarks.quality.remix.likelihoods import PACK_TOKENS, plain_log_likelihoods
from benchmarks.quality.remix.sets import REFERENCES, SETS, WITHOUT_PASSAGE
from benchmarks.quality.tasks import Task, load, olmes
from benchmarks.quality.tasks.question import ChoiceQuestion
from moe_tta.adapter import AdapterModel, last_row_routing
from moe_tta.remix.assemble import build_store
from moe_tta.remix.build import BuildOptions, Recorded, Verdict
from moe_tta.remix.card import ModelCard
from moe_tta.remix.checkpoint import weights_hash
from moe_tta.remix.questions import Question, Score, chosen
from moe_tta.remix.shards import sha256
from moe_tta.remix.store import Store, load_store

PROMPTS = 16  # recorded at once


class AdapterEngine:
    """Judges and records reference questions with the adapter's forward.

    Args:
        model: The adapter.
        tokenizer: Its own.
        card: What the store says of the model.
        score: How choices are compared.
    """

    def __init__(
        self, model: AdapterModel, tokenizer: Tokenizer, card: ModelCard, score: Score
    ):
        self._model, self._tokenizer = model, tokenizer
        self.model, self.score = card, score

    def judge(self, questions: Sequence[Question]) -> list[Verdict]:
        """Say of each question whether the model answers it rightly."""
        encoded = [self._encode(question) for question in questions]
        verdicts: list[Verdict] = []
        budget = PACK_TOKENS[self._model.device.type]
        for group in packs(encoded, budget):
            sums = plain_log_likelihoods(self._model, [encoded[i] for i in group])
            for index, values in zip(group, sums, strict=True):
                question = questions[index]
                best = chosen(values, question.choices, self.score)
                verdicts.append("right" if best == question.gold else "wrong")
        return verdicts

    def record(self, questions: Sequence[Question]) -> Recorded:
        """Record pathways; hidden states have width 0, since texts are embedded."""
        prompts = [self._tokenizer.encode(q.prompt).ids for q in questions]
        shape = (len(prompts), len(self.model.moe_layers), self.model.num_experts)
        pathways = np.zeros(shape, np.float32)
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        for first in range(0, len(order), PROMPTS):
            some = order[first : first + PROMPTS]
            routing = last_row_routing(self._model, [prompts[i] for i in some])
            pathways[some] = routing.cpu().numpy()
        nothing = np.zeros((len(prompts), 0), np.float32)
        return Recorded(pathways, nothing, nothing)

    def _encode(self, question: Question) -> Encoded:
        contexts = (question.prompt,) * len(question.choices)
        return encode(
            self._tokenizer,
            ChoiceQuestion(question.prompt, contexts, question.choices, question.gold),
        )


def open_references(
    args: argparse.Namespace, task: Task, model: AdapterModel, tokenizer: Tokenizer
) -> Store:
    """Return the task's reference store, built in the work folder if it is not there.

    Args:
        args: Options of the command.
        task: The task that is tested.
        model: The adapter.
        tokenizer: Its own.

    Raises:
        ValueError: data is missing, or the store there was made otherwise.
    """
    name = args.model.resolve().name
    folder = args.work / f"remix-{name}-{task.name}"
    folder.mkdir(parents=True, exist_ok=True)
    data, out = folder / "references.jsonl", folder / "references"
    data.write_text("\n".join(_lines(args, task)) + "\n", "utf-8")
    card = ModelCard.of(
        model.shape, name=name, weights=weights_hash(args.model), dtype=args.dtype
    )
    if not out.exists():
        engine = AdapterEngine(model, tokenizer, card, task.normalisation)
        with tqdm(desc="references", total=_num_lines(data)) as bar:
            return build_store(engine, data, out, BuildOptions(), bar.update)
    store = load_store(out)
    store.check(card)
    if store.card.data_sha256 != sha256(data):
        raise ValueError(
            f"{out} holds other references; name another --work folder or remove it"
        )
    return store


def _lines(args: argparse.Namespace, task: Task) -> Iterator[str]:
    for name in REFERENCES[task.name]:
        part = SETS[name]
        source = Task(name, "choice", olmes.read_requests, part, part)
        questions, _ = load(source, part, args.data, 0, args.references, args.seed)
        for question in questions:
            asked = question.contexts[0]
            yield Question(
                prompt=without_passage(asked) if name in WITHOUT_PASSAGE else asked,
                choices=question.choices,
                gold=question.gold,
            ).model_dump_json(exclude_defaults=True)


def without_passage(context: str) -> str:
    """Return a question without the passage that SciQ puts before it."""
    _, mark, asked = context.rpartition("Question:")
    return mark + asked


def _num_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)
