# SPDX-License-Identifier: Apache-2.0
"""`make demo`: its verdicts, and the whole of it once."""

import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks.demo.cases import cases
from benchmarks.demo.client import Answer
from benchmarks.demo.report import faults
from benchmarks.demo.traces import Routing, find_trace, read_routing
from tests.docs.blocks import ROOT
from tests.docs.test_data import LAB


def test_routing_is_read_from_a_trace(tmp_path):
    # two tokens, one layer, width 3: k = 2 as the model's own, then another expert
    tensors = {
        "stock_ids": np.array([[[4, 1, 4]], [[0, 2, 0]]], np.int32),
        "topk_ids": np.array([[[1, 4, 1]], [[0, 3, 5]]], np.int32),
        "topk_weights": np.array([[[0.6, 0.4, 0]], [[0.5, 0.3, 0.2]]], np.float32),
    }
    save_file(tensors, tmp_path / "cmpl-1-0.safetensors")
    routing = read_routing(find_trace(tmp_path, "cmpl-1"), 8)
    assert routing.changed_tokens == 0.5
    assert routing.changed_choices == 0.5
    assert routing.experts_per_token == 2.5
    assert routing.shares[0].tolist() == [0.5, 0.5, 0, 0.5, 0.5, 0.5, 0, 0]


def test_a_missing_trace_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="no trace of cmpl-9"):
        find_trace(tmp_path, "cmpl-9", seconds=0)


def test_faults_name_what_was_expected():
    stock = np.zeros((1, 30, 8), bool)
    stock[:, :, :2] = True
    routing, answer = Routing(stock, stock), Answer("text")
    todo = cases(LAB, adapted=True)
    assert faults([(todo[0], answer, routing)]) == []
    assert faults([(todo[2], answer, routing)]) == ["dynamic_k: k=1: expected 1 expert"]
    assert "HTTP 400" in faults([(todo[-1], answer, routing)])[0]
    refusal = Answer("no", status=400, param="moe_tta.steer.promote[0]")
    assert faults([(todo[-1], refusal, None)]) == []
    assert "no" in faults([(todo[1], refusal, None)])[0]


def test_demo(lab, tmp_path):
    lab("smollm2-moe")
    command = [sys.executable, "-m", "benchmarks.demo", "--out", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every request came as expected" in done.stdout
    assert (tmp_path / "heatmap.png").read_bytes().startswith(b"\x89PNG")
