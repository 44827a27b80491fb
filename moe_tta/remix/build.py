# SPDX-License-Identifier: Apache-2.0
"""Building a store: judge and record in parts that survive a kill, then assemble."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np

from moe_tta.remix.card import EmbedderCard, ModelCard, Precision
from moe_tta.remix.embed import MINILM, TextEmbedder, unit
from moe_tta.remix.errors import StoreError
from moe_tta.remix.questions import Question, read_questions
from moe_tta.remix.shards import sha256, write_tensors
from moe_tta.remix.store import check_pathways

Verdict = Literal["right", "wrong", "too_long"]
HIDDEN = ("hidden_last", "hidden_mean")
PART_QUESTIONS = 256
SETTINGS_FILE = "build.json"


class Recorded(NamedTuple):
    """What reading n prompts left behind, float32."""

    pathways: np.ndarray  # [n, L, E]
    hidden_last: np.ndarray  # [n, H]
    hidden_mean: np.ndarray  # [n, H]


class Engine(Protocol):
    """What a builder asks of the model."""

    score: str

    @property
    def model(self) -> ModelCard:
        """The model."""

    def judge(self, questions: Sequence[Question]) -> list[Verdict]:
        """Say of each question whether the model answers it rightly."""

    def record(self, questions: Sequence[Question]) -> Recorded:
        """Record the questions' pathways and hidden states."""


@dataclass(frozen=True)
class BuildOptions:
    """How a store is built.

    Attributes:
        embedder: `hidden_last`, `hidden_mean`, or a sentence-transformers model.
        layers: Decoder layers to keep; `None` keeps all MoE layers.
        precision: Of the stored distributions.
        duplicates_from: Cosine similarity from which a reference counts as a
            near-duplicate of an earlier one; more than 1 keeps all.
        part_questions: Questions judged and recorded before the next save.
    """

    embedder: str = MINILM
    layers: tuple[int, ...] | None = None
    precision: Precision = "float32"
    duplicates_from: float = 0.98
    part_questions: int = PART_QUESTIONS


def work_folder(out: Path) -> Path:
    """Return where an unfinished build keeps its parts."""
    return out.with_name(out.name + ".building")


def part_file(number: int) -> str:
    """Return a part's file name."""
    return f"part-{number:06d}.safetensors"


def record_parts(
    engine: Engine,
    data: Path,
    out: Path,
    options: BuildOptions,
    progress: Callable[[int], None],
) -> EmbedderCard:
    """Judge and record all questions; parts that are there already are kept.

    A part holds, of its right answers, `rows` (numbers of the questions), `pathways`,
    `embeddings`, `norms`; and `counts` [3]: questions, too long, wrong.

    Args:
        engine: The model.
        data: File of questions.
        out: The store to be.
        options: How to build it.
        progress: Called with the number of questions done.

    Raises:
        StoreError: an unfinished build was started otherwise; a question is malformed.
    """
    embed, card = _embedder(engine, options.embedder)
    layers = _places(engine.model, options.layers)
    folder = work_folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    _check_settings(folder / SETTINGS_FILE, _settings(engine, data, options, card))
    first = 0
    for number, part in enumerate(_batches(data, options.part_questions)):
        path = folder / part_file(number)
        if not path.exists():
            verdicts = engine.judge(part)
            right = [i for i, verdict in enumerate(verdicts) if verdict == "right"]
            asked = [part[i] for i in right]
            tensors = _tensors(engine, asked, embed, card.dim, layers, options)
            counts = [len(part), verdicts.count("too_long"), verdicts.count("wrong")]
            rows = np.array(right, np.int64) + first
            write_tensors(path, {**tensors, "rows": rows, "counts": np.array(counts)})
        first += len(part)
        progress(len(part))
    if not first:
        raise StoreError(f"{data}: holds no question")
    return card


def _batches(data: Path, size: int) -> Iterator[list[Question]]:
    questions = read_questions(data)
    while part := list(islice(questions, size)):
        yield part


def _tensors(
    engine: Engine,
    asked: list[Question],
    embed: Callable[[list[Question], Recorded], np.ndarray],
    dim: int,
    layers: list[int],
    options: BuildOptions,
) -> dict[str, np.ndarray]:
    experts = engine.model.num_experts
    dtype = np.dtype(options.precision)
    if not asked:
        return {
            "pathways": np.zeros((0, len(layers), experts), dtype),
            "embeddings": np.zeros((0, dim), np.float32),
            "norms": np.zeros(0, np.float32),
        }
    recorded = engine.record(asked)
    pathways = recorded.pathways[:, layers].astype(dtype)
    check_pathways(pathways)
    embeddings, norms = unit(embed(asked, recorded))
    return {"pathways": pathways, "embeddings": embeddings, "norms": norms}


def _embedder(
    engine: Engine, name: str
) -> tuple[Callable[[list[Question], Recorded], np.ndarray], EmbedderCard]:
    if name in HIDDEN:
        probe = engine.record([Question(prompt="A", answers=("A",))])
        dim = getattr(probe, name).shape[1]
        card = EmbedderCard(kind=name, dim=dim)
        return lambda asked, recorded: getattr(recorded, name), card
    text = TextEmbedder(name)
    return lambda asked, _: text.embed_all([q.embedded for q in asked]), text.card


def _places(model: ModelCard, layers: tuple[int, ...] | None) -> list[int]:
    """Return the chosen layers' places among the model's MoE layers."""
    chosen = model.moe_layers if layers is None else sorted(set(layers))
    if wrong := sorted(set(chosen) - set(model.moe_layers)):
        raise StoreError(f"layer {wrong[0]} is no MoE layer of this model")
    return [model.moe_layers.index(layer) for layer in chosen]


def _settings(
    engine: Engine, data: Path, options: BuildOptions, embedder: EmbedderCard
) -> dict:
    # duplicates are dropped at the end, so that an unfinished build may change it
    chosen = {k: v for k, v in asdict(options).items() if k != "duplicates_from"}
    return {
        "model": engine.model.model_dump(),
        "data_sha256": sha256(data),
        "score": engine.score,
        **chosen,
        "embedder": embedder.model_dump(),
        "layers": None if options.layers is None else sorted(set(options.layers)),
    }


def _check_settings(path: Path, settings: dict) -> None:
    if not path.exists():
        path.write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
        return
    before = json.loads(path.read_text("utf-8"))
    if wrong := [name for name in settings if settings[name] != before.get(name)]:
        raise StoreError(
            f"{path.parent}: an unfinished build with another {', '.join(wrong)}; "
            "finish it as it was begun, or remove the folder"
        )
