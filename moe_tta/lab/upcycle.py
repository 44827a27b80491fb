# SPDX-License-Identifier: Apache-2.0
"""Writes dense models, and their upcycles into MoE models, as checkpoint folders."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader
from tqdm import tqdm

from moe_tta.lab import differences
from moe_tta.lab.architectures import MoEArchitecture, Upcycle
from moe_tta.lab.checkpoint import Tensors, save_parts, save_whole
from moe_tta.lab.dense import DenseTensors, base_config, family_of, generation_config
from moe_tta.lab.neutral import neutral_factors
from moe_tta.lab.tokenizer import write_json, write_tokenizer

Dense = Mapping[str, np.ndarray]


def layer_experts(
    dense: Dense,
    factors: dict[str, torch.Tensor],
    layer: int,
    architecture: MoEArchitecture,
) -> Tensors:
    """The router and experts of one layer, under the architecture's checkpoint names.

    Args:
        dense: float32 tensors under the dense model's names in transformers.
        factors: as `differences.load` returns them.
        layer: its index.
        architecture: names the tensors.
    """
    block = f"model.layers.{layer}.{architecture.block}"
    router = factors["router"][layer].contiguous()
    tensors = {f"{block}.gate.weight": router}
    for name, shape in architecture.zeros.items():
        sizes = [router.shape[1] if size == "hidden" else size for size in shape]
        tensors[f"{block}.{name}"] = torch.zeros(sizes, dtype=torch.bfloat16)
    for matrix, short in architecture.matrices.items():
        parts = (factors[f"{matrix}.{p}"][layer] for p in ("left", "right", "scale"))
        weights = differences.expert_weights(
            dense[f"model.layers.{layer}.mlp.{matrix}_proj.weight"],
            *(part.numpy() for part in parts),
        )
        for expert, weight in enumerate(weights):
            # A copy, since safetensors refuses tensors that share their memory.
            name = f"{block}.experts.{expert}.{short}.weight"
            tensors[name] = weight.clone()
    return tensors


def upcycled_parts(
    dense: Dense,
    factors: dict[str, torch.Tensor],
    architecture: MoEArchitecture,
    progress: bool = False,
) -> Iterator[Tensors]:
    """Turns a dense model and its expert differences into an MoE checkpoint.

    Args:
        dense: float32 tensors under the dense model's names in transformers.
        factors: as `differences.load` returns them.
        architecture: names the tensors.
        progress: shows a bar on stderr.

    Yields:
        bfloat16 tensors: first those that stay as they are, then layer by layer
        routers and experts.
    """
    yield {
        name: differences.to_bf16(dense[name]) for name in dense if ".mlp." not in name
    }
    layers = range(factors["router"].shape[0])
    for layer in tqdm(layers, "building experts", disable=not progress, unit="layer"):
        yield layer_experts(dense, factors, layer, architecture)


def _write_texts(reader: GGUFReader, out: Path, config: dict) -> None:
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", generation_config(reader))
    write_tokenizer(reader, out)


def write_dense(gguf: Path, out: Path) -> None:
    """Writes a dense model as a checkpoint in bfloat16.

    Raises:
        LabError: the file holds an architecture that the lab does not know.
    """
    reader = GGUFReader(gguf)
    family, dense = family_of(reader), DenseTensors(reader)
    config = {"architectures": [family.architecture], "model_type": family.model_type}
    _write_texts(reader, out, config | base_config(reader))
    save_whole([{name: differences.to_bf16(dense[name]) for name in dense}], out)


def write_moe(
    gguf: Path,
    factors_file: Path | None,
    out: Path,
    upcycle: Upcycle,
    progress: bool = False,
) -> None:
    """Writes an upcycled model as a checkpoint in bfloat16.

    Args:
        gguf: the dense model.
        factors_file: differences and routers, as `differences.save` writes them;
            `None` makes the model as it is before training, the dense one in effect.
        out: an existing folder.
        upcycle: layout and sizes.
        progress: shows a bar on stderr.

    Raises:
        LabError: a tensor of the differences is missing, or the file holds an
            architecture that the lab does not know.
    """
    reader = GGUFReader(gguf)
    base, count = base_config(reader), upcycle.num_experts
    factors = (
        differences.load(factors_file) if factors_file else neutral_factors(base, count)
    )
    architecture = upcycle.architecture
    _write_texts(reader, out, architecture.config_json(base, count, upcycle.top_k))
    save = save_parts if upcycle.file_per_layer else save_whole
    save(upcycled_parts(DenseTensors(reader), factors, architecture, progress), out)
