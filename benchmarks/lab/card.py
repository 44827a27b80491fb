# SPDX-License-Identifier: Apache-2.0
"""Builds a lab model and records the hashes of its files in its card.

    python -m benchmarks.lab.card smollm2-moe

Run once after training. `moe_tta.lab` compares every later build with the card.
"""

import argparse
import importlib.metadata
import json
import platform
import tempfile
from pathlib import Path

from moe_tta.lab.cache import default_cache, inventory
from moe_tta.lab.fetch import sha256
from moe_tta.lab.models import (
    DIFFERENCES,
    MODELS,
    card_path,
    trained_differences,
    write_files,
)

LIBRARIES = ("gguf", "numpy", "safetensors", "torch")


def make_card(name: str) -> dict:
    """Builds a model in a temporary folder and describes its files."""
    cache, model = default_cache(), MODELS[name]
    with tempfile.TemporaryDirectory() as scratch:
        write_files(name, Path(scratch), cache, progress=True)
        files = inventory(Path(scratch))
    differences = trained_differences(name)
    inputs = {DIFFERENCES: sha256(differences)} if differences else {}
    versions = {library: importlib.metadata.version(library) for library in LIBRARIES}
    return {
        "model": name,
        "summary": model.summary,
        "licence": "Apache-2.0",
        "dense": {
            "wheels": list(model.dense.wheels),
            "gguf_sha256": model.dense.sha256,
        },
        "inputs": inputs,
        "files": files,
        "made_with": {"python": platform.python_version(), **versions},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("name", choices=MODELS)
    name = parser.parse_args().name
    text = json.dumps(make_card(name), indent=1)
    card_path(name).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
