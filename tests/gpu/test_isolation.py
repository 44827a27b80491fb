# SPDX-License-Identifier: Apache-2.0
"""Requests in a crowd, on a GPU: each row obeys its own request's plan.

Outputs cannot show that there: in bfloat16 those of requests without any plan differ
alone and in a crowd too, also with VLLM_BATCH_INVARIANT=1 (docs/log.md). So routing is
compared, row by row (tests/plugin/audit.py), with chunks, preemption and aborts.
"""

import logging

import pytest
import torch

from tests.plugin.gpu_audit import audited
from tests.plugin.test_isolation import TOKENS

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device"
)
COUNT = 2000
K_MAX = {"mixtral": 6, "olmoe": 12}
log = logging.getLogger(__name__)
GRAPHS = {
    "enforce_eager": False,
    "gpu_memory_utilization": 0.1,
    "kv_cache_memory_bytes": 2**28,
    "dtype": "float32",
    "max_model_len": 256,
    "compilation_config": {  # full graphs, without the time of compiling
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [1, 2, 4, 8, 16],
    },
}
CROWDED = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "num_gpu_blocks_override": 40,
}


@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
def test_every_row(tiny_models, name):
    options = {**GRAPHS, **CROWDED}
    options["additional_config"] = {"moe_tta": {"k_max": K_MAX[name]}}
    found = audited(tiny_models(name), COUNT, TOKENS, options)
    log.info("%s: %s", name, found)
    assert found["finished"] + found["aborted"] == COUNT
    for what in ("aborted", "chunks", "preemptions", "prefix_hits"):
        assert found[what] > 20
    assert found["layers"] == 4
    assert found["planned_rows"] > found["rows"] / 2
    assert found["wrong"] == 0


def test_a_leak_would_be_seen(tiny_models):
    """Every fifth step, all rows obey their neighbours' slots."""
    options = {**GRAPHS, **CROWDED}
    options["additional_config"] = {"moe_tta": {"k_max": K_MAX["olmoe"]}}
    found = audited(tiny_models("olmoe"), 60, TOKENS, options, spoil=True)
    log.info("%s", found)
    assert found["wrong"] > found["rows"] / 50
