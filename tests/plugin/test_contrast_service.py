# SPDX-License-Identifier: Apache-2.0
"""What a pair is refused for, what breaks it, and what the outside sees of it."""

import json
from types import SimpleNamespace

import pytest
from prometheus_client import REGISTRY
from vllm.exceptions import VLLMValidationError
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from moe_tta.settings import EngineSettings, SettingsError
from moe_tta.vllm_plugin import pair_limits, upstream
from moe_tta.vllm_plugin.lockstep import Lockstep
from moe_tta.vllm_plugin.pairs import FOLLOWER
from moe_tta.vllm_plugin.plan_cache import PlanCache
from tests.plugin.engine import engine, generate, sampling, status
from tests.plugin.test_contrast_crowd import check_empty, scheduler_of
from tests.plugin.test_isolation import counters

PROMPT = list(range(3, 60))
CONTRAST = {"contrast": {"weak": {"rank": 2}}}


@pytest.fixture(scope="module")
def llm(tiny_models):
    options = {"max_model_len": 256, "block_size": 32, "num_gpu_blocks_override": 12}
    with engine(tiny_models("mixtral"), dtype="float32", **options) as llm:
        yield llm


def test_pinned_sources_are_the_installed_ones():
    assert upstream.changed() == ()
    assert pair_limits.scheduler_reason(Scheduler) is None
    assert pair_limits.scheduler_reason(AsyncScheduler) is None


def test_every_overridden_method_is_pinned(llm):
    """A method that a mix-in replaces without a pin would change unseen."""
    kinds = type(scheduler_of(llm)).__mro__
    ours = [kind for kind in kinds if kind.__module__.startswith("moe_tta")]
    pins = json.loads(upstream.PINS.read_text())
    pinned = {name.rsplit(".", 1)[1] for name in pins if "Scheduler." in name}
    replaced = {
        name
        for kind in ours
        for name in vars(kind)
        if callable(vars(kind)[name]) and hasattr(Scheduler, name)
    }
    assert len(replaced) > 8
    assert replaced <= pinned


def test_hashes_see_a_change(tmp_path, monkeypatch):
    name = "vllm.v1.core.sched.utils:check_stop"
    pins = tmp_path / "pins.json"
    pins.write_text(json.dumps({name: "0" * 16, "vllm.nowhere:gone": "0" * 16}))
    monkeypatch.setattr(upstream, "PINS", pins)
    upstream.changed.cache_clear()
    try:
        assert upstream.changed() == (name, "vllm.nowhere:gone")
        reason = pair_limits.scheduler_reason(Scheduler)
        assert reason == (
            "this vLLM differs from the one pairs were written for, in check_stop, gone"
        )
    finally:
        upstream.changed.cache_clear()


def test_another_scheduler_class_is_refused():
    class Other:
        pass

    assert "Other is not vLLM's own" in pair_limits.scheduler_reason(Other)


def gpu_reason(monkeypatch, vllm_config, is_cuda=True, **changes):
    """Return the reason on a machine that is no CPU, with some of V2's settings."""
    platform = type(pair_limits.current_platform)
    monkeypatch.setattr(platform, "is_cpu", lambda self: False)
    monkeypatch.setattr(platform, "is_cuda", lambda self: is_cuda)
    settings = {"use_v2_model_runner": True, "sharded": False, **changes}
    monkeypatch.setattr(
        type(vllm_config), "use_v2_model_runner", settings["use_v2_model_runner"]
    )
    parallel = vllm_config.parallel_config
    monkeypatch.setattr(parallel, "enable_batch_sharded_sampling", settings["sharded"])
    return pair_limits.engine_reason(vllm_config)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"is_cuda": False}, "CPUs and NVIDIA GPUs only"),
        ({"use_v2_model_runner": False}, "Model Runner V2 only"),
        ({"sharded": True}, "different GPUs"),
    ],
)
def test_what_gpu_engines_need(llm, monkeypatch, changes, words):
    config = llm.llm_engine.input_processor.moe_tta.vllm_config
    reason = gpu_reason(monkeypatch, config, **changes)
    assert reason is None if words is None else words in reason


REFUSED = [
    ({"prompt_logprobs": 1}, PROMPT, "prompt_logprobs"),
    ({}, [5], "at least 2 tokens"),
    ({"tokens": 190}, PROMPT, "need 16 KV blocks of 32 tokens, and this engine has 11"),
]


@pytest.mark.parametrize(("options", "prompt", "words"), REFUSED)
def test_refused(llm, options, prompt, words):
    before = pair_metrics(llm)
    with pytest.raises(VLLMValidationError, match=words) as error:
        generate(llm, [prompt], [sampling(moe_tta=CONTRAST, **options)])
    assert error.value.parameter == "moe_tta"
    assert pair_metrics(llm) == {**before, "refused": before["refused"] + 1}


@pytest.mark.parametrize(
    ("section", "options", "words"),
    [
        ("scheduler_config", {"max_num_seqs": 1}, "one sequence at a time"),
        ("scheduler_config", {"enable_chunked_prefill": False}, "chunked prefill"),
        (None, {"watermark_config": object()}, "watermarks"),
    ],
)
def test_refused_engines(llm, monkeypatch, section, options, words):
    config = llm.llm_engine.input_processor.moe_tta.vllm_config
    owner = config if section is None else getattr(config, section)
    for name, value in options.items():
        monkeypatch.setattr(owner, name, value)
    admission = llm.llm_engine.input_processor.moe_tta
    monkeypatch.setattr(admission, "cache", PlanCache())
    with pytest.raises(VLLMValidationError, match=words) as error:
        generate(llm, [PROMPT], [sampling(4, CONTRAST)])
    assert error.value.parameter == "moe_tta.contrast"
    # what the operator registers is refused when the engine starts
    settings = EngineSettings.read({"presets": {"keen": CONTRAST}})
    monkeypatch.setattr(admission, "settings", settings)
    with pytest.raises(SettingsError, match=rf"presets.keen.*{words}"):
        admission._check_registered()


def test_pooling_is_refused(llm):
    admission = llm.llm_engine.input_processor.moe_tta
    # a default preset reaches pooling requests too
    params = SimpleNamespace(extra_args={"moe_tta": CONTRAST})
    compiled = admission.compile(params, resumable=False)
    request = SimpleNamespace(sampling_params=None, cache_salt=None)
    with pytest.raises(VLLMValidationError, match="not pooling"):
        admission.attach(request, compiled, str)


def test_a_pair_that_just_fits(llm):
    """Ten of eleven blocks; a second pair must wait for the first."""
    params = [sampling(160 - len(PROMPT), CONTRAST)] * 2
    prompts = [PROMPT, PROMPT[::-1]]
    both = generate(llm, prompts, params)
    alone = [generate(llm, [p], params[:1])[0] for p in prompts]
    assert both == alone
    check_empty(llm)


def start(llm, request_id="a", tokens=40, steps=3):
    """Begin a contrast request and return its id inside the engine."""
    core = llm.llm_engine
    core.add_request(
        request_id, {"prompt_token_ids": PROMPT}, sampling(tokens, CONTRAST)
    )
    for _ in range(steps):
        core.step()
    return next(iter(scheduler_of(llm).pairs)).removesuffix(FOLLOWER)


def finish(llm):
    found = []
    while llm.llm_engine.has_unfinished_requests():
        found += [o for o in llm.llm_engine.step() if o.finished]
    return found


def test_aborting_a_request_ends_its_follower(llm):
    start(llm)
    assert len(scheduler_of(llm).requests) == 2
    llm.llm_engine.abort_request(["a"])
    assert finish(llm) == []
    check_empty(llm)


def test_a_killed_follower_fails_its_own_request_only(llm):
    lead = start(llm)
    llm.llm_engine.add_request("b", {"prompt_token_ids": PROMPT}, sampling(8))
    scheduler_of(llm).finish_requests(lead + FOLLOWER, RequestStatus.FINISHED_ABORTED)
    ended = {o.request_id: o.outputs[0] for o in finish(llm)}
    assert ended["a"].finish_reason == "error"
    assert ended["b"].finish_reason == "length"
    assert len(ended["b"].token_ids) == 8
    check_empty(llm)


def test_a_pair_out_of_step_fails_instead_of_guessing(llm, monkeypatch):
    """The last line of defence, should the scheduler choose tokens another way."""
    start(llm, steps=1)
    monkeypatch.setattr(
        Lockstep,
        "_reserve_prefill_lookahead",
        lambda self, request, computed, count: (
            0 if self.pairs.follows(request.request_id) else count
        ),
    )
    (ended,) = finish(llm)
    assert ended.outputs[0].finish_reason == "error"
    monkeypatch.undo()
    check_empty(llm)


def pair_metrics(llm):
    """Return the process's metrics of pairs."""
    model = llm.llm_engine.vllm_config.model_config.served_model_name
    labels = {"model_name": model, "engine": "0"}
    metrics = {
        "running": ("moe_tta:pairs_running", labels),
        "admitted": ("moe_tta:pairs_admitted_total", labels),
        "preempted": ("moe_tta:pairs_preempted_total", labels),
        "refused": ("moe_tta:pairs_refused_total", {"model_name": model}),
    }
    return {key: REGISTRY.get_sample_value(*of) or 0 for key, of in metrics.items()}


def test_outputs_and_metrics_know_one_request(llm):
    before, pairs = counters(llm), pair_metrics(llm)
    core = llm.llm_engine
    core.add_request("a", {"prompt_token_ids": PROMPT}, sampling(6, CONTRAST))
    seen, running = [], set()
    while core.has_unfinished_requests():
        seen += core.step()
        assert counters(llm)["vllm:num_requests_running"] <= 1
        assert counters(llm)["vllm:num_requests_waiting"] == 0
        running.add(pair_metrics(llm)["running"])
    assert {output.request_id for output in seen} == {"a"}
    after = counters(llm)
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["vllm:generation_tokens"] == 6
    assert grown["vllm:prompt_tokens"] == len(PROMPT)
    assert grown["vllm:prefix_cache_queries"] <= len(PROMPT)
    assert 1 in running
    assert pair_metrics(llm) == {**pairs, "admitted": pairs["admitted"] + 1}
    assert status(llm)["pairs"] == 1  # the worker's own count, until its next step
    check_empty(llm)


def test_streams_have_their_own_cache(llm):
    """The strong stream shares stock KV, the weak one shares with its like only."""
    llm.reset_prefix_cache()
    core = scheduler_of(llm)
    pool = core.kv_cache_manager.block_pool
    hits = []
    lookup = core.kv_cache_manager.get_computed_blocks
    core.kv_cache_manager.get_computed_blocks = lambda request: (
        hits.append(lookup(request)) or hits[-1]
    )
    try:
        for request in (None, CONTRAST, {"dynamic_k": {"rank": 2}}, CONTRAST):
            generate(llm, [PROMPT], [sampling(1, request)])
    finally:
        core.kv_cache_manager.get_computed_blocks = lookup
    # plain; strong and weak; the weak plan by itself; strong and weak again
    assert [hit[1] for hit in hits] == [0, 32, 0, 32, 32, 32]
    assert pool.get_num_free_blocks() == 11


@pytest.mark.parametrize("extra", [{"moe_tta_pair": {"lead": "x"}}, {"moe_tta_x": 1}])
def test_clients_cannot_write_links(llm, extra):
    params = sampling(2)
    params.extra_args = extra
    with pytest.raises(VLLMValidationError, match="unknown parameter"):
        generate(llm, [PROMPT], [params])


def test_asks_written_by_hand_are_refused(llm):
    """The scheduler must never meet one that admission has not made."""
    core = llm.llm_engine
    made = core.input_processor.process_inputs(
        "a",
        {"prompt_token_ids": PROMPT},
        sampling(2, CONTRAST),
        core.get_supported_tasks(),
    )
    assert set(made.sampling_params.extra_args) == {"moe_tta_pair"}
    made.sampling_params.extra_args = {"moe_tta_pair": {"combination": "contrast"}}
    with pytest.raises(VLLMValidationError, match="built by hand") as error:
        core.add_request("a", made, made.sampling_params)
    assert error.value.parameter == "moe_tta_pair"
