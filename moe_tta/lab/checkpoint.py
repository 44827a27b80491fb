# SPDX-License-Identifier: Apache-2.0
"""Writes tensors as the safetensors files of a checkpoint folder."""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from moe_tta.lab.tokenizer import write_json

Tensors = dict[str, torch.Tensor]
METADATA = {"format": "pt"}  # one key alone: the order of several is not fixed


def save_whole(parts: Iterable[Tensors], out: Path) -> None:
    """Writes all parts into one file, ``model.safetensors``."""
    tensors = {name: tensor for part in parts for name, tensor in part.items()}
    save_file(tensors, out / "model.safetensors", metadata=METADATA)


def save_parts(parts: Iterable[Tensors], out: Path) -> None:
    """Writes each part into a file of its own, and the index of them.

    One part is in memory at a time, if `parts` is a generator.
    """
    index, total = {}, 0
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05d}.safetensors"
        save_file(part, out / name, metadata=METADATA)
        index |= dict.fromkeys(part, name)
        total += sum(tensor.nbytes for tensor in part.values())
    content = {"metadata": {"total_size": total}, "weight_map": index}
    write_json(out / "model.safetensors.index.json", content)
