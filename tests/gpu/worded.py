# SPDX-License-Identifier: Apache-2.0
"""A tiny Mixtral that can read a reference store's questions."""

import shutil
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast

from moe_tta.adapter import Neighbour
from moe_tta.remix.card import ModelCard
from moe_tta.remix.checkpoint import weights_hash
from moe_tta.remix.lookup import LookUp, find_neighbours
from moe_tta.vllm_plugin.model_shape import shape_from_config
from tests.remix.making import DIM, made_store

COUNT = 3  # references: `q0 right 0` and so on
NEAR = [0.9, 0.5, 0.3] + [0.0] * (DIM - COUNT)
WORDS = ["<unk>", "</s>", "q0", "q1", "q2", "right", "0", "1", "2"]


def with_words(model, folder):
    """Copy a model of 256 tokens and give it a tokenizer of as many words."""
    shutil.copytree(model, folder)
    words = [*WORDS, *(f"w{number}" for number in range(len(WORDS), 256))]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def store_of(model, folder):
    """Build a store of three references with pathways drawn at random."""
    shape = shape_from_config(AutoConfig.from_pretrained(model))
    weights = weights_hash(Path(model))
    card = ModelCard.of(shape, name="tiny", weights=weights, dtype="float32")
    pathways = np.random.default_rng(1).dirichlet(
        np.ones(shape.num_experts) / 4, (COUNT, len(shape.layers))
    )
    return made_store(folder, np.eye(COUNT, DIM), pathways, card)


def nearest(store):
    """Return the neighbours of `NEAR` as the served request weighs them."""
    unit = np.array(NEAR, np.float32) / np.linalg.norm(NEAR)
    found = find_neighbours(store, unit, LookUp())
    weights = (found.weights / found.weights.sum()).tolist()
    return [
        Neighbour([WORDS.index(f"q{row}")], [WORDS.index("right"), 6 + row], weight)
        for row, weight in zip(found.rows.tolist(), weights, strict=True)
    ]
