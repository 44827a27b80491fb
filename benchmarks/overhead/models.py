# SPDX-License-Identifier: Apache-2.0
"""The models measured, and what an engine of one needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_tta.shape import RouterShape
from moe_tta.vllm_plugin.model_shape import shape_from_config

CONFIGS = Path(__file__).parent / "configs"
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
BLOCK = 128  # tokens; a multiple of every KV block size vLLM picks for these models
BESIDE = 3 * 2**30  # bytes of an engine beside weights and KV: graphs, activations


@dataclass(frozen=True)
class Model:
    """A model folder.

    Attributes:
        name: What results call it; never a path.
        folder: Holds config.json and perhaps weights.
        config: The Hugging Face config.
        shape: The routers' shape, with the model's own k.
    """

    name: str
    folder: Path
    config: Any
    shape: RouterShape

    @staticmethod
    def find(name: str) -> Model:
        """Read a built-in config (`olmoe`, `qwen3-30b`) or any folder with one.

        Raises:
            ValueError: there is no such model, or it has no MoE layers.
        """
        from transformers import AutoConfig

        builtin = CONFIGS / name
        folder = (builtin if builtin.is_dir() else Path(name)).resolve()
        if not (folder / "config.json").is_file():
            known = ", ".join(sorted(path.name for path in CONFIGS.iterdir()))
            raise ValueError(f"expected {known} or a folder, got {name!r}")
        config = AutoConfig.from_pretrained(folder)
        shape = shape_from_config(config)
        if shape is None:
            raise ValueError(f"{name} has no MoE layers")
        return Model(folder.name, folder, config, shape)

    @property
    def load_format(self) -> str:
        """vLLM's option: random weights where the folder has none."""
        return "auto" if any(self.folder.glob("*.safetensors")) else "dummy"

    def kv_bytes(self, tokens: int, dtype: str) -> int:
        """Return the size of a KV cache for so many tokens."""
        config = self.config
        head_dim = getattr(config, "head_dim", None)
        head_dim = head_dim or config.hidden_size // config.num_attention_heads
        heads = config.num_hidden_layers * config.num_key_value_heads
        # two blocks more: one is vLLM's null block
        return (tokens + 2 * BLOCK) * 2 * heads * head_dim * DTYPE_BYTES[dtype]

    def engine_bytes(self, kv_bytes: int, dtype: str) -> int:
        """Estimate the device memory of one engine."""
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            weights = AutoModelForCausalLM.from_config(self.config).num_parameters()
        return weights * DTYPE_BYTES[dtype] + kv_bytes + BESIDE


def round_up(tokens: int) -> int:
    """Return the least multiple of `BLOCK` that is not smaller."""
    return -(-tokens // BLOCK) * BLOCK
