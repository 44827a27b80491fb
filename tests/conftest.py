# SPDX-License-Identifier: Apache-2.0
import os

# before vLLM or torch is imported anywhere
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# engines of several test processes must not be bound to the same core
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
# stock vLLM on CPU is bit-exact across batching only so, and in float32 (docs/log.md)
os.environ.setdefault("VLLM_CPU_ATTN_SPLIT_KV", "0")

import pytest
from hypothesis import settings

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=100)
settings.load_profile("ci")


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """Builds tiny random MoE models: tiny_models("mixtral") -> folder."""
    from tests.tiny import build

    folder = tmp_path_factory.mktemp("tiny")
    built = {}

    def get(name):
        if name not in built:
            built[name] = build(name, folder / name)
        return str(built[name])

    return get


@pytest.fixture(scope="session")
def lab():
    """Builds (or finds) a lab model: lab("smollm2-moe") -> folder."""
    from moe_tta.lab import lab_path

    return lambda name: str(lab_path(name, progress=False))


@pytest.fixture
def one_thread():
    """Keep tiny operations off the thread pool, where they mostly wait."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
