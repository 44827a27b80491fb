# SPDX-License-Identifier: Apache-2.0
"""Stores for tests: made of arrays, or built by an engine that knows all answers."""

import json

import numpy as np

from moe_tta import RouterShape
from moe_tta.remix.assemble import build_store
from moe_tta.remix.build import BuildOptions, Recorded
from moe_tta.remix.card import EmbedderCard, ModelCard
from moe_tta.remix.serving import ServedStore

SHAPE = RouterShape(
    layers=(1, 2, 3, 5, 6, 7, 8), num_hidden_layers=9, num_experts=6, top_k=2, k_max=2
)
MODEL = ModelCard.of(SHAPE, name="made", weights="00", dtype="float32")
DIM = 8


class MadeEngine:
    """Answers rightly unless told otherwise; pathways and states are given.

    Question number i is the one whose prompt is `q<i>`.
    """

    score = "raw"

    def __init__(self, pathways, states, verdicts=None, model=MODEL):
        self.model = model
        self.pathways = np.asarray(pathways, np.float32)
        self.states = np.asarray(states, np.float32)
        self.verdicts = verdicts or {}
        self.asked = []

    def judge(self, questions):
        numbers = [int(q.prompt[1:]) for q in questions]
        self.asked += numbers
        return [self.verdicts.get(number, "right") for number in numbers]

    def record(self, questions):
        # the builder reads one prompt to learn the width of hidden states
        numbers = [int(q.prompt[1:] or 0) for q in questions]
        states = self.states[numbers]
        return Recorded(self.pathways[numbers], states, 2 * states)


def write_questions(path, count):
    lines = (
        json.dumps({"prompt": f"q{i}", "choices": [f"right {i}", "no"], "gold": 0})
        for i in range(count)
    )
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def random_pathways(rng, count, shape=SHAPE):
    return rng.dirichlet(np.ones(shape.num_experts), (count, len(shape.layers)))


def made_store(folder, states, pathways, model=MODEL, **options):
    """Build a store whose embeddings are `states`, scaled to length 1."""
    folder.mkdir(parents=True, exist_ok=True)
    data = write_questions(folder / "questions.jsonl", len(states))
    engine = MadeEngine(pathways, states, model=model)
    chosen = {"embedder": "hidden_last", "duplicates_from": 2.0, **options}
    return build_store(engine, data, folder / "store", BuildOptions(**chosen))


class TableEmbedder:
    """Looks texts up in a table."""

    def __init__(self, table, dim=DIM):
        self.table = table
        self.card = EmbedderCard(kind="text", model="table", weights="00", dim=dim)

    def embed(self, text):
        return np.array(self.table[text], np.float32)


def served(store, table=None):
    """Serve a made store; a table of texts stands in for its embedder."""
    embedder = None if table is None else TableEmbedder(table)
    return ServedStore(store, embedder)
