# SPDX-License-Identifier: Apache-2.0
"""The path of GPU engines on a CPU: the kernel interpreted, the staging as it is.

`python -m tests.plugin.gpu_path MODEL K_MAX OUT [STORE]`, with TRITON_INTERPRET=1,
writes what the engine generates by either path, with knn where a token store is given.
What stays out: experts that skip, and graphs.
"""

import json
import random
import sys
from pathlib import Path
from unittest import mock

from moe_tta.vllm_plugin import gpu_router, rows
from tests.plugin.engine import engine, generate, sampling
from tests.requests import random_request

STORE = "learned"  # name of the token store in requests
OPTIONS = {
    "dtype": "float32",
    "max_model_len": 128,
    "block_size": 32,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,  # chunks
    "enable_prefix_caching": False,
}


def jobs(shape):
    rng = random.Random(23)
    demoted = {"steer": {"demote": [[layer, 0] for layer in shape.layers]}}
    requests = [None, {"dynamic_k": {"k": 1}}, demoted]
    requests += [random_request(rng, shape) for _ in range(9)]
    prompts = [
        [rng.randrange(2, 256) for _ in range(rng.randrange(2, 40))] for _ in requests
    ]
    return prompts, [sampling(5, request) for request in requests]


def knn_jobs(shape, store):
    """A few short ones: the interpreter takes a second for some ten rows."""
    rng = random.Random(24)
    knn = {"knn": {"store": STORE, "k": 3}}
    requests = [None, {"dynamic_k": {"k": 1}}, knn, {**knn, "renorm": "never"}]
    requests.append(random_request(rng, shape, store))
    prompts = [
        [rng.randrange(2, 256) for _ in range(rng.randrange(2, 12))] for _ in requests
    ]
    return prompts, [sampling(3, request) for request in requests]


def run(model, k_max, folder):
    stores = {} if folder is None else {STORE: folder}
    settings = {"moe_tta": {"k_max": k_max, "stores": stores}}
    with engine(model, **OPTIONS, additional_config=settings) as llm:
        worker = llm.llm_engine.model_executor.driver_worker.worker
        armed = worker.model_runner.moe_tta.armed
        context = llm.llm_engine.input_processor.moe_tta.context
        store = context.stores.get(STORE)
        asked = knn_jobs(context.shape, store) if store else jobs(context.shape)
        return type(armed[0]).__name__, generate(llm, *asked)


def main(model, k_max, out, store=None):
    original = rows.StepRows.__init__

    def pretend(self, *args):
        original(self, *args)
        self.on_cpu = False

    with (
        mock.patch.object(rows.StepRows, "__init__", pretend),
        mock.patch.object(gpu_router, "let_experts_skip", return_value=False),
    ):
        theirs = run(model, int(k_max), store)
    Path(out).write_text(json.dumps([theirs, run(model, int(k_max), store)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
