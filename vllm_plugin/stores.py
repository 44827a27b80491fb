# SPDX-License-Identifier: Apache-2.0
"""The operator's reference stores, opened and checked once in each process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moe_tta.remix.card import ModelCard
from moe_tta.remix.checkpoint import find_checkpoint, weights_hash
from moe_tta.remix.errors import StoreError
from moe_tta.remix.serving import (
    ServedStore,
    ServedTokens,
    holds_tokens,
    open_served_tokens,
)
from moe_tta.remix.tokens import TokenStore
from moe_tta.settings import EngineSettings
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
    settings: EngineSettings, vllm_config: Any, shape: RouterShape
) -> dict[str, ServedStore | ServedTokens | StoreError]:
    """Open the operator's stores by name, in the API process.

    One that cannot be used does not stop the server: its error stands in its place, is
    logged, and answers every request that names it.
    """
    opened: dict[str, ServedStore | ServedTokens | StoreError] = {}
    for place, (name, path) in enumerate(settings.stores.items(), start=1):
        try:
            model = model_card(vllm_config, shape)
            if holds_tokens(path):
                tokens = open_served_tokens(path, model, settings.max_store_mib)
                for _ in tokens.layers():  # read in order to be checked
                    pass
                opened[name] = ServedTokens(tokens.card, place)
            else:
                opened[name] = ServedStore.open(path, model)
        except StoreError as err:
            logger.error("moe-tta cannot use store %s: %s", name, err)
            opened[name] = err
    return opened


def token_stores(
    settings: EngineSettings, vllm_config: Any, shape: RouterShape
) -> Iterator[tuple[int, TokenStore]]:
    """Open the token stores among the operator's, in the worker.

    Yields:
        A store's place and the store. Those that cannot be used are left out, as
        `open_stores` leaves them out: no request can name them.
    """
    for place, path in enumerate(settings.stores.values(), start=1):
        try:
            if holds_tokens(path):
                model = model_card(vllm_config, shape)
                yield place, open_served_tokens(path, model, settings.max_store_mib)
        except StoreError:
            continue  # the API process says why
