# SPDX-License-Identifier: Apache-2.0
"""The demo's reference store: a few questions, run through the model itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.demo.server import ENVIRONMENT, ServerError, tail

NAME = "solved"
QUESTIONS = [
    {"prompt": "At night the owl looked up and saw", "choices": ["the stars", "x q"]},
    {"prompt": "The bird sat on the tree and began to", "choices": ["sing", "of of"]},
    {"prompt": "The sea looked blue because of the", "choices": ["sky", "zzz"]},
    {"prompt": "Two and two make", "choices": ["four", "the the"]},
]


def build_store(model: str, scratch: Path) -> Path:
    """Run `moe-tta remix build` on the questions; returns the store's folder."""
    data, out, log = (scratch / name for name in ("questions.jsonl", NAME, "build.log"))
    lines = (json.dumps({**question, "gold": 0}) for question in QUESTIONS)
    data.write_text("\n".join(lines) + "\n", "utf-8")
    command = [Path(sys.executable).with_name("moe-tta"), "remix", "build", model]
    command += [data, "-o", out, "--max-model-len", "1024"]
    env = {**ENVIRONMENT, **os.environ}
    with log.open("wb") as file:
        done = subprocess.run(command, stdout=file, stderr=file, env=env)
    if done.returncode != 0:
        raise ServerError(f"moe-tta remix build failed:\n{tail(log)}")
    return out
