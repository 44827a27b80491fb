# SPDX-License-Identifier: Apache-2.0
"""The worker's token memories: the operator's token stores as tensors, by layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from moe_tta.kernels.recall import LayerMemory
from moe_tta.remix.errors import StoreError
from moe_tta.remix.tokens import TokenLayer, TokenStore
from moe_tta.settings import EngineSettings
from moe_tta.shape import RouterShape
from moe_tta.vllm_plugin.model_shape import UnsupportedModelError
from moe_tta.vllm_plugin.stores import token_stores

LayerMemories = tuple[LayerMemory | None, ...]


class Memories:
    """Token memories of one engine, at fixed addresses.

    Args:
        stores: Token stores that fit the model, with their places in plans, from 1.
        shape: The model's routers.
        device: Where the tensors live.
    """

    def __init__(
        self,
        stores: Iterable[tuple[int, TokenStore]],
        shape: RouterShape,
        device: torch.device,
    ):
        self.nbytes = self.count = 0
        self._shape, self._held = shape, {}
        for place, store in stores:
            try:
                layers = {
                    number: _to_device(layer, shape.num_experts, device)
                    for number, layer in store.layers()
                }
            except StoreError:
                continue  # the API process found the same and answers requests with it
            self._held[place] = layers
            self.count += 1
            self.nbytes += store.card.memory_bytes

    @staticmethod
    def load(
        settings: EngineSettings,
        vllm_config: Any,
        shape: RouterShape,
        device: torch.device,
    ) -> Memories:
        """Load what the settings name.

        Raises:
            UnsupportedModelError: there is a token store and the device is no CPU.
        """
        stores = token_stores(settings, vllm_config, shape)
        if device.type != "cpu" and any(True for _ in stores):
            raise UnsupportedModelError.because(
                "token stores (strategy knn) have not been run on a GPU"
            )
        return Memories(stores, shape, device)

    def layer(self, index: int) -> LayerMemories:
        """Return one layer's memories by place, from 1; empty where there is none.

        Args:
            index: The layer's position in `shape.layers`.
        """
        if not self._held:
            return ()
        number = self._shape.layers[index]
        places = range(1, max(self._held) + 1)
        return tuple(self._held.get(place, {}).get(number) for place in places)


def _to_device(
    layer: TokenLayer, num_experts: int, device: torch.device
) -> LayerMemory:
    """Return float64 keys of length 1 and dense values; see `LayerMemory`."""
    keys = torch.tensor(layer.keys, dtype=torch.float64)
    keys /= keys.norm(dim=1, keepdim=True)
    values = torch.zeros(len(keys), num_experts)
    values.scatter_(1, torch.tensor(layer.ids), torch.tensor(layer.weights))
    return LayerMemory(keys.to(device), values.to(device))
