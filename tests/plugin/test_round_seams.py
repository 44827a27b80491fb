# SPDX-License-Identifier: Apache-2.0
"""Reports travel with any kind of output, and set-ups without gradients are refused."""

from types import SimpleNamespace

import pytest
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput

from moe_tta.vllm_plugin.adapter_loading import load_services
from moe_tta.vllm_plugin.model_shape import UnsupportedModelError
from moe_tta.vllm_plugin.round_orders import ORDERS, REPORTS
from moe_tta.vllm_plugin.round_seams import follow_rounds


class Later(AsyncModelRunnerOutput):
    """An output as asynchronous scheduling and Model Runner V2 give it."""

    def get_output(self):
        return EMPTY_MODEL_RUNNER_OUTPUT


class Runner:
    """Gives `None` for steps that sample, as both of vLLM's runners do."""

    def __init__(self, sampled):
        self.sampled = sampled

    def execute_model(self, scheduler_output):
        return None if scheduler_output.rows else EMPTY_MODEL_RUNNER_OUTPUT

    def sample_tokens(self, grammar_output):
        return self.sampled


class State:
    """Reports each step's orders as done."""

    def __init__(self):
        self.waiting = []
        self.rounds = self

    def obey(self, scheduler_output):
        self.waiting += getattr(scheduler_output, ORDERS, [])

    def take_reports(self):
        taken, self.waiting = self.waiting, []
        return taken


def step(rows, orders):
    return SimpleNamespace(rows=rows, **{ORDERS: orders})


@pytest.mark.parametrize("later", [False, True], ids=["at once", "later"])
def test_reports_leave_with_the_step_that_made_them(later):
    runner = Runner(Later() if later else EMPTY_MODEL_RUNNER_OUTPUT)
    follow_rounds(runner, State())
    empty = runner.execute_model(step(0, ["a"]))
    assert getattr(empty, REPORTS) == ["a"]
    assert runner.execute_model(step(3, ["b"])) is None
    output = runner.sample_tokens(None)
    output = output.get_output() if later else output
    assert getattr(output, REPORTS) == ["b"]
    # the next steps have none, and vLLM's shared empty output was left alone
    runner.sampled = EMPTY_MODEL_RUNNER_OUTPUT
    assert runner.execute_model(step(3, [])) is None
    assert runner.sample_tokens(None) is EMPTY_MODEL_RUNNER_OUTPUT
    assert not hasattr(EMPTY_MODEL_RUNNER_OUTPUT, REPORTS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tensor_parallel_size": 2}, "tensor parallelism gives each GPU a part"),
        ({"quantization": "fp8"}, r"weights are quantised \(fp8\)"),
        ({"model": "nobody/nothing"}, "neither a folder nor in the Hugging Face cache"),
    ],
)
def test_refused_when_the_engine_starts(changes, words):
    given = {"tensor_parallel_size": 1, "quantization": None, "model": "m", **changes}
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(**given),
        model_config=SimpleNamespace(**given, revision=None, dtype=None),
        device_config=SimpleNamespace(device_type="cpu"),
    )
    with pytest.raises(UnsupportedModelError, match=words):
        load_services(config, None)
