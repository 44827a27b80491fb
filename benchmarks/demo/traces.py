# SPDX-License-Identifier: Apache-2.0
"""What the routing traces of finished requests say."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


@dataclass(frozen=True)
class Routing:
    """Experts of one request, bool [tokens, layers, experts].

    `stock` is the model's own choice on the same router logits, `used` are the
    experts with a weight above 0.
    """

    stock: np.ndarray
    used: np.ndarray

    @property
    def changed(self) -> np.ndarray:
        """[tokens, layers] whether experts changed."""
        return (self.stock != self.used).any(axis=2)

    @property
    def changed_tokens(self) -> float:
        """Share of tokens whose experts changed in one layer or more."""
        return float(self.changed.any(axis=1).mean())

    @property
    def changed_choices(self) -> float:
        """Share of (token, layer) pairs whose experts changed."""
        return float(self.changed.mean())

    @property
    def experts_per_token(self) -> float:
        return float(self.used.sum(axis=2).mean())

    @property
    def shares(self) -> np.ndarray:
        """[layers, experts] share of tokens that use each expert."""
        return self.used.mean(axis=0)


def read_routing(path: Path, num_experts: int) -> Routing:
    tensors = load_file(path)
    stock = _one_hot(tensors["stock_ids"], num_experts)
    ids, weights = tensors["topk_ids"], tensors["topk_weights"]
    return Routing(stock, _one_hot(ids, num_experts, weights > 0))


def _one_hot(ids: np.ndarray, num_experts: int, chosen=True) -> np.ndarray:
    experts = np.arange(num_experts)
    hits = ids[..., None] == experts
    return (hits & np.broadcast_to(chosen, ids.shape)[..., None]).any(axis=2)


def find_trace(folder: Path, response_id: str, seconds: float = 10) -> Path:
    """Wait for the trace of a response; the server writes it with its next step."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = folder.glob(f"{response_id}*.safetensors")
        # a contrast request's second stream writes a trace of its own
        if own := [path for path in found if not path.stem.endswith("_follower")]:
            return own[0]
        time.sleep(0.1)
    raise RuntimeError(f"the server wrote no trace of {response_id} into {folder}")
