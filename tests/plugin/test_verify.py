# SPDX-License-Identifier: Apache-2.0
"""`moe-tta verify` is green on real engines and red when the plugin is broken.

A break is code in a `sitecustomize.py` that the engine's process imports by itself;
the product knows nothing of it.
"""

import json

import pytest
from typer.testing import CliRunner

from moe_tta.cli import app
from moe_tta.vllm_plugin.verify import CHECKS

PLUG = """
import os
import moe_tta.vllm_plugin as plugin

installed = plugin.register

def register():
    installed()
    if os.environ["MOE_TTA_DISABLE"] == "0":
        import broken

plugin.register = register
"""

# check -> a module that breaks what it guards
BREAKS = {
    "armed": """
from moe_tta.vllm_plugin.worker import WorkerState
arm = WorkerState._arm_layers
WorkerState._arm_layers = lambda self, runners, shape: arm(self, runners[:-1], shape)
""",
    "fires": """
from moe_tta.vllm_plugin.router import LayerRouting
LayerRouting.apply = lambda self, logits, weights, ids, hidden=None: None
""",
    "neutral": """
from moe_tta.vllm_plugin.router import LayerRouting
LayerRouting.apply = lambda self, logits, weights, ids, hidden=None: weights.mul_(1.001)
""",
    "isolated": """
import torch
from moe_tta.vllm_plugin.rows import StepRows
stage = StepRows.stage

def leak(self, requests, req_ids, num_scheduled, num_computed):
    stage(self, requests, req_ids, num_scheduled, num_computed)
    if self._used:
        self._used = int(num_scheduled.sum())
        self._slots[:self._used] = self._slots[:self._used].max()
        self.planned = torch.arange(self._used)

StepRows.stage = leak
""",
    "contrast": """
from moe_tta.vllm_plugin.pair_rows import PairRows
PairRows.combine = lambda self, logits, rows: logits
""",
    "prefix-cache": """
from moe_tta.compiled import CompiledRequest
CompiledRequest.salt = lambda self, prompt_len, client_salt: None
""",
    "clean": """
from moe_tta.vllm_plugin.worker import WorkerState
changed = WorkerState.requests_changed
WorkerState.requests_changed = lambda self, finished, new: changed(self, (), new)
""",
}

CRASH = """
import os
from moe_tta.vllm_plugin.rows import StepRows

def stage(self, requests, *step):
    if requests:
        print("the engine room is on fire", flush=True)
        os.abort()

StepRows.stage = stage
"""


@pytest.fixture
def break_engines(monkeypatch, tmp_path):
    def plug(code):
        (tmp_path / "sitecustomize.py").write_text(PLUG)
        (tmp_path / "broken.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return plug


def verify(model, *options):
    """Return the exit code and the results: {check: [row, ...]}."""
    result = CliRunner().invoke(app, ["verify", model, "--json", *options])
    rows = {}
    for row in json.loads(result.stdout)["rows"]:
        rows.setdefault(row["check"], []).append(row)
    return result, rows


@pytest.mark.parametrize(
    ("name", "dtype", "engines"), [("mixtral", "auto", 3), ("olmoe", "float32", 2)]
)
def test_green(tiny_models, name, dtype, engines):
    result, rows = verify(tiny_models(name), "--dtype", dtype)
    assert result.exit_code == 0, result.stdout
    assert list(rows) == list(CHECKS)
    assert len(rows["clean"]) == engines - 1
    assert len(result.stderr.splitlines()) == engines


@pytest.mark.parametrize("check", BREAKS)
def test_red_when_broken(tiny_models, break_engines, check):
    break_engines(BREAKS[check])
    result, rows = verify(tiny_models("mixtral"), "--only", check)
    assert result.exit_code == 1
    ((row,),) = rows.values()
    assert (row["check"], row["ok"]) == (check, False)
    assert "exit code" not in row["evidence"]


def test_crash_is_a_red_row(tiny_models, break_engines):
    break_engines(CRASH)
    only = [f"--only={check}" for check in ("armed", "fires", "prefix-cache")]
    result, rows = verify(tiny_models("mixtral"), *only)
    assert result.exit_code == 1
    assert rows["armed"][0]["ok"]
    assert not rows["fires"][0]["ok"]
    assert "exit code -6" in rows["fires"][0]["evidence"]
    assert "the engine room is on fire" in rows["fires"][0]["evidence"]
    assert rows["prefix-cache"][0]["evidence"] == "not run"


def test_paths_without_a_model_are_named(tmp_path):
    cases = {
        str(tmp_path): f"expected a model's folder, got {tmp_path} without config.json",
        str(tmp_path / "no"): f"there is no file or folder {tmp_path}/no",
        "./no": "there is no file or folder ./no",
    }
    for model, words in cases.items():
        result = CliRunner().invoke(app, ["verify", model])
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr == f"moe-tta: {words}\n"


def test_unsupported_models_are_refused(tmp_path):
    config = {
        "architectures": ["JambaForCausalLM"],
        "model_type": "jamba",
        "num_experts": 8,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    result, rows = verify(str(tmp_path))
    assert result.exit_code == 1
    assert rows == {}
    assert "does not know the routers of model type 'jamba'" in result.stderr
