# SPDX-License-Identifier: Apache-2.0
"""The worker's token memories: the operator's token stores as tensors, by layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from moe_tta.kernels.packed_memory import PackedMemory, StoredTokens, pack
from moe_tta.kernels.recall import LayerMemory
from moe_tta.remix.errors import StoreError
from moe_tta.remix.tokens import TokenLayer, TokenStore
from moe_tta.settings import EngineSettings
from moe_tta.shape import RouterShape
from moe_tta.vllm_plugin.stores import token_stores

LayerMemories = tuple[LayerMemory | None, ...]


class Memories:
    """Token memories of one engine, at fixed addresses.

    Args:
        stores: Token stores that fit the model, with their places in plans, from 1.
        shape: The model's routers.
        device: Where the tensors live.
        packed: Whether kernels read them (`packed`), or plain torch (`layer`).
    """

    def __init__(
        self,
        stores: Iterable[tuple[int, TokenStore]],
        shape: RouterShape,
        device: torch.device,
        packed: bool = False,
    ):
        self.nbytes = self.count = 0
        self._shape, self._held = shape, {}
        make = _stored if packed else _widened
        for place, store in stores:
            try:
                layers = {
                    number: make(layer, shape.num_experts, device)
                    for number, layer in store.layers()
                }
            except StoreError:
                continue  # the API process found the same and answers requests with it
            self._held[place] = layers
            self.count += 1
            self.nbytes += 0 if packed else store.card.memory_bytes
        self._packed: dict[int, PackedMemory] = {}
        if packed:
            self._pack(device)

    @staticmethod
    def load(
        settings: EngineSettings,
        vllm_config: Any,
        shape: RouterShape,
        device: torch.device,
        packed: bool,
    ) -> Memories:
        """Load what the settings name; arguments as the constructor's."""
        stores = token_stores(settings, vllm_config, shape)
        return Memories(stores, shape, device, packed)

    def layer(self, index: int) -> LayerMemories:
        """Return one layer's memories by place, from 1; empty where there is none.

        Args:
            index: The layer's position in `shape.layers`.
        """
        return tuple(self._by_place(self._shape.layers[index]))

    def packed(self, index: int) -> PackedMemory | None:
        """Return one layer's memories together; `None` where there is none.

        Args:
            index: The layer's position in `shape.layers`.
        """
        return self._packed.get(self._shape.layers[index])

    def _by_place(self, number: int) -> list:
        places = range(1, max(self._held, default=0) + 1)
        return [self._held.get(place, {}).get(number) for place in places]

    def _pack(self, device: torch.device) -> None:
        """Put each layer's memories together, and drop the parts."""
        for number in self._shape.layers:
            stored = self._by_place(number)
            for layers in self._held.values():
                layers.pop(number, None)
            if any(one is not None for one in stored):
                memory = self._packed[number] = pack(stored, device)
                self.nbytes += memory.nbytes


def _widened(layer: TokenLayer, num_experts: int, device: torch.device) -> LayerMemory:
    """Return float64 keys of length 1 and dense values; see `LayerMemory`."""
    keys = torch.tensor(layer.keys, dtype=torch.float64)
    keys /= keys.norm(dim=1, keepdim=True)
    return LayerMemory(keys.to(device), _dense(layer, num_experts).to(device))


def _stored(layer: TokenLayer, num_experts: int, device: torch.device) -> StoredTokens:
    """Return float32 keys and dense values; see `PackedMemory`."""
    keys = torch.tensor(layer.keys, dtype=torch.float32)
    return StoredTokens(keys.to(device), _dense(layer, num_experts).to(device))


def _dense(layer: TokenLayer, num_experts: int) -> torch.Tensor:
    values = torch.zeros(len(layer.keys), num_experts)
    return values.scatter_(1, torch.tensor(layer.ids), torch.tensor(layer.weights))
