# SPDX-License-Identifier: Apache-2.0
"""The operator's reference stores in the API process, opened and checked once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_tta.remix.card import ModelCard
from moe_tta.remix.checkpoint import find_checkpoint, weights_hash
from moe_tta.remix.errors import StoreError
from moe_tta.remix.serving import ServedStore
from moe_tta.shape import RouterShape
from moe_tta.vllm_plugin import compat

logger = compat.get_logger(__name__)


def model_card(vllm_config: Any, shape: RouterShape) -> ModelCard:
    """Describe the served model as stores name theirs.

    Raises:
        StoreError: its checkpoint cannot be found or has no safetensors files.
    """
    config = vllm_config.model_config
    folder = find_checkpoint(config.model, config.revision)
    return ModelCard.of(
        shape,
        name=config.model.rstrip("/").rsplit("/", 1)[-1],
        weights=weights_hash(folder),
        dtype=str(config.dtype).removeprefix("torch."),
        quantization=config.quantization,
    )


def open_stores(
    paths: Mapping[str, str], vllm_config: Any, shape: RouterShape
) -> dict[str, ServedStore | StoreError]:
    """Open the operator's stores by name.

    One that cannot be used does not stop the server: its error stands in its place, is
    logged, and answers every request that names it.
    """
    opened: dict[str, ServedStore | StoreError] = {}
    for name, path in paths.items():
        try:
            opened[name] = ServedStore.open(path, model_card(vllm_config, shape))
        except StoreError as err:
            logger.error("moe-tta cannot use remix store %s: %s", name, err)
            opened[name] = err
    return opened
