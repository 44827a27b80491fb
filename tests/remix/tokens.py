# SPDX-License-Identifier: Apache-2.0
"""Token stores for tests: built of a tiny model, or of arrays."""

import json
from pathlib import Path

import numpy as np
import torch

from moe_tta.adapter import AdapterModel
from moe_tta.remix.card import DescentCard, ModelCard, TokenCard, TokenCounts
from moe_tta.remix.checkpoint import weights_hash
from moe_tta.remix.folder import describe_files, write_card
from moe_tta.remix.reference_model import ReferenceModel
from moe_tta.remix.shards import write_tensors
from moe_tta.remix.tokens import layer_file, load_tokens, memory_bytes


def encode(text):
    """Stand in for a tokenizer: a token for each character, after a first one."""
    return [0, *(2 + ord(char) % 250 for char in text)]


def reference_model(folder):
    adapter = AdapterModel.from_checkpoint(folder, torch.float32)
    weights = weights_hash(Path(folder))
    card = ModelCard.of(adapter.shape, name="tiny", weights=weights, dtype="float32")
    return ReferenceModel(adapter, card, encode)


def write_labelled(path, pairs):
    lines = ({"prompt": prompt, "answers": [answer]} for prompt, answer in pairs)
    path.write_text("\n".join(map(json.dumps, lines)) + "\n", "utf-8")
    return path


def token_card(model, tokens, layers, hidden_size=8, folder=None):
    """Return the card of a store of this shape, and of a folder's files."""
    return TokenCard(
        model=model,
        layers=list(layers),
        hidden_size=hidden_size,
        precision="float32",
        data_sha256="",
        descent=DescentCard(scored="text", steps=0, lr=0, clip=0, before=0, after=0),
        counts=TokenCounts(
            questions=1, too_long=0, unimproved=0, repeated=0, tokens=tokens
        ),
        memory_bytes=memory_bytes(len(layers), tokens, hidden_size, model.num_experts),
        created_by="a test",
        files={} if folder is None else describe_files(folder),
    )


def made_tokens(folder, model, layers, **members):
    """Write a token store of arrays; `layers` gives (keys, ids, weights) by layer."""
    folder.mkdir(parents=True)
    for number, (keys, ids, weights) in layers.items():
        keys = keys / np.linalg.norm(keys, axis=1, keepdims=True)
        tensors = {
            "keys": keys.astype(np.float32),
            "ids": ids.astype(np.int64),
            "weights": weights.astype(np.float32),
        }
        write_tensors(folder / layer_file(number), tensors)
    tokens, hidden_size = next(iter(layers.values()))[0].shape
    card = token_card(model, tokens, sorted(layers), hidden_size, folder)
    write_card(folder, card.model_copy(update=members))
    return load_tokens(folder)


def random_layers(rng, model, tokens, hidden_size, layers=None):
    """Draw keys and assignments of `top_k` experts for each MoE layer."""
    drawn = {}
    for number in model.moe_layers if layers is None else layers:
        ids = rng.random((tokens, model.num_experts)).argsort(axis=1)[:, : model.top_k]
        weights = rng.dirichlet(np.ones(model.top_k), tokens)
        drawn[number] = (rng.standard_normal((tokens, hidden_size)), ids, weights)
    return drawn
