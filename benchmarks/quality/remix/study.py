# SPDX-License-Identifier: Apache-2.0
"""What a run holds throughout: the model, its references, the rule of neighbours."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from benchmarks.quality.remix.references import open_references
from benchmarks.quality.tasks import Task
from moe_tta.adapter import AdapterModel
from moe_tta.remix.embed import TextEmbedder, open_embedder
from moe_tta.remix.lookup import LookUp
from moe_tta.remix.store import Store

# C3PO's filter: a reference more similar counts as the question itself
CEILING = 0.95


@dataclass(frozen=True)
class Study:
    """What all batches share.

    Attributes:
        model: The adapter.
        tokenizer: Its own.
        store: The references.
        embedder: Of their texts.
        look_up: Which are neighbours; `k` of them for every question.
        layers: Decoder layers whose distribution is given.
        seed: Of the random references.
    """

    model: AdapterModel
    tokenizer: Tokenizer
    store: Store
    embedder: TextEmbedder
    look_up: LookUp
    layers: tuple[int, ...]
    seed: int


def open_study(args: argparse.Namespace, task: Task) -> Study:
    """Load the model and open, or build, the task's references.

    Args:
        args: Options of the command.
        task: The task that is tested.

    Raises:
        ValueError: the adapter does not know the model, or there is no such device; see
            also `open_references`.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no CUDA device here")
    dtype = getattr(torch, args.dtype)
    model = AdapterModel.from_checkpoint(args.model, dtype, args.device)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    store = open_references(args, task, model, tokenizer)
    return Study(
        model=model,
        tokenizer=tokenizer,
        store=store,
        embedder=open_embedder(store.card.embedder),
        look_up=LookUp(k=args.k, kernel=args.kernel, floor=-1.0, ceiling=CEILING),
        layers=model.shape.layers[-args.layers :],
        seed=args.seed,
    )
