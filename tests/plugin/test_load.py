# SPDX-License-Identifier: Apache-2.0
"""What the plugin refuses when an engine starts, and how it is switched off."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoConfig
from vllm.exceptions import VLLMValidationError

from moe_tta.vllm_plugin import compat
from moe_tta.vllm_plugin.limits import refuse_unsupported
from moe_tta.vllm_plugin.model_shape import UnsupportedModelError, shape_from_config
from tests.plugin.engine import engine, generate, sampling, status

PARALLEL = {
    "pipeline_parallel_size": 1,
    "data_parallel_size": 1,
    "prefill_context_parallel_size": 1,
    "decode_context_parallel_size": 1,
    "tensor_parallel_size": 1,
    "enable_expert_parallel": False,
    "enable_eplb": False,
    "use_sequence_parallel_moe": False,
    "use_ubatching": False,
}
CONFIG = {"speculative_config": None, "lora_config": None, "kv_transfer_config": None}


def refusal(parallel=(), config=(), monolithic=False, device="cuda"):
    vllm_config = SimpleNamespace(
        **{**CONFIG, **dict(config)},
        device_config=SimpleNamespace(device_type=device),
        parallel_config=SimpleNamespace(**{**PARALLEL, **dict(parallel)}),
    )
    refuse_unsupported(vllm_config, [SimpleNamespace(is_monolithic=monolithic)])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_plain_set_up_is_accepted(device):
    refusal(device=device)


@pytest.mark.parametrize("experts", [False, True])
def test_parallelism_of_one_batch_is_accepted_on_gpus(experts):
    refusal({"tensor_parallel_size": 2, "enable_expert_parallel": experts})


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"parallel": {"pipeline_parallel_size": 2}}, "pipeline"),
        ({"parallel": {"data_parallel_size": 2}}, "data parallelism"),
        (
            {"parallel": {"tensor_parallel_size": 2}, "device": "cpu"},
            "tensor parallelism on CPU",
        ),
        ({"parallel": {"enable_eplb": True}}, "expert load balancing"),
        ({"parallel": {"use_sequence_parallel_moe": True}}, "sequence-parallel"),
        ({"parallel": {"use_ubatching": True}}, "micro-batching"),
        ({"config": {"speculative_config": object()}}, "speculative"),
        ({"config": {"lora_config": object()}}, "LoRA"),
        ({"config": {"kv_transfer_config": object()}}, "KV connector"),
        ({"monolithic": True}, "--moe-backend triton"),
    ],
)
def test_refused_set_ups_name_reason_and_way_out(options, reason):
    with pytest.raises(UnsupportedModelError, match="MOE_TTA_DISABLE=1") as error:
        refusal(**options)
    assert reason in str(error.value)


def test_other_vllm_versions_fail_closed():
    compat.check_version("0.32.5")
    for version in ("0.31.0", "0.33.0", "1.0.0"):
        with pytest.raises(RuntimeError, match=rf"0\.32\.x, found {version}"):
            compat.check_version(version)


def test_unknown_family_is_refused():
    config = AutoConfig.for_model("jamba", num_experts=8)
    with pytest.raises(UnsupportedModelError, match=r"jamba.*known: deepseek_v2"):
        shape_from_config(config)


@pytest.mark.parametrize("k_max", [1, 9])
def test_k_max_out_of_range(k_max):
    config = AutoConfig.for_model("mixtral")
    with pytest.raises(UnsupportedModelError, match=r"k_max must lie in 2\.\.8"):
        shape_from_config(config, k_max)


def start(model, settings=None, **env):
    """Start an engine in its own process; return its exit code and last words."""
    code = (
        "import sys, json; from tests.plugin.engine import *;"
        "llm = make_engine(sys.argv[1], additional_config=json.loads(sys.argv[2]));"
        "print('ADMISSION', hasattr(llm.llm_engine.input_processor, 'moe_tta'))"
    )
    config = json.dumps({} if settings is None else {"moe_tta": settings})
    done = subprocess.run(
        [sys.executable, "-c", code, model, config],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        cwd=Path(__file__).parents[2],
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("env", "on"),
    [
        ({}, True),
        ({"MOE_TTA_DISABLE": "1"}, False),
        ({"VLLM_PLUGINS": "moe_tta"}, True),
        ({"VLLM_PLUGINS": "other"}, False),
    ],
    ids=str,
)
def test_switches(tiny_models, env, on):
    code, text = start(tiny_models("mixtral"), **env)
    assert code == 0, text
    assert f"ADMISSION {on}" in text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"allow_inlin": True}, "did you mean 'allow_inline'"),
        ({"k_max": 99}, "k_max must lie in 2..8"),
        ({"artefacts": {"a": "missing-folder"}}, "missing-folder"),
        ({"presets": {"a": {"steer": {"demote": [[9, 0]]}}}}, "presets.a"),
        ({"default": "b"}, "no preset"),
    ],
    ids=str,
)
def test_bad_settings_stop_the_engine(tiny_models, settings, words):
    code, text = start(tiny_models("mixtral"), settings)
    assert code != 0
    assert words in text


def test_simulated_routing_is_refused(tiny_models):
    code, text = start(
        tiny_models("mixtral"), VLLM_MOE_ROUTING_SIMULATION_STRATEGY="uniform_random"
    )
    assert code != 0
    assert "RoutingSimulatorRouter" in text


def test_requests_built_by_hand_are_refused(tiny_models):
    """A worker must never meet parameters that admission has not compiled."""
    with engine(tiny_models("mixtral")) as llm:
        core = llm.llm_engine
        made = core.input_processor.process_inputs(
            "a",
            {"prompt_token_ids": [3, 4, 5]},
            sampling(2, {"dynamic_k": {"k": 1}}),
            core.get_supported_tasks(),
        )
        assert made.cache_salt.startswith("moe-tta:")
        made.sampling_params.extra_args = {"moe_tta": {"dynamic_k": {"k": 1}}}
        with pytest.raises(VLLMValidationError, match="built by hand"):
            core.add_request("a", made, made.sampling_params)


def test_register_twice_hooks_once(tiny_models):
    from moe_tta.vllm_plugin import register

    register()
    register()
    with engine(tiny_models("mixtral")) as llm:
        assert status(llm)["armed_layers"] == [0, 1, 2, 3]
        assert generate(
            llm, [list(range(3, 40))], [sampling(2, {"dynamic_k": {"k": 1}})]
        )
