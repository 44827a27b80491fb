# SPDX-License-Identifier: Apache-2.0
"""Rounds by probes: as the adapter's own, unseen by others, and what goes wrong."""

import random

import numpy as np
import pytest
import torch
from vllm.v1.engine.output_processor import OutputProcessor

from moe_tta.adapter import AdapterModel, Outcome, Rerouting, reroute
from moe_tta.adapter.packing import PackedTexts
from moe_tta.adapter.survey import survey
from moe_tta.adapter.tail import Tail
from moe_tta.vllm_plugin import probe_jobs, probe_scheduler
from moe_tta.vllm_plugin.probes import PROBE
from tests.plugin.engine import engine, generate, outputs, sampling, status
from tests.plugin.probed import complete
from tests.plugin.probed import heard as heard
from tests.plugin.test_isolation import counters
from tests.plugin.test_probes import EPS, EXACT, ROUNDS, SPSA
from tests.plugin.test_reroute import draw_prompts
from tests.plugin.test_reroute_crowd import check_empty, scheduler_of

TOKENS = 20
PROMPT = list(range(3, 63))
# a logit of up to 16, through some 12 roundings in each of 4 layers
FLOAT32 = 16 * 12 * 4 * EPS
ADAM = {"reroute": {"every": 8, "steps": 2, "lr": 0.3}}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def llm(tiny_models, tmp_path_factory):
    """An engine with an adapter: spsa does not ask it."""
    traces = tmp_path_factory.mktemp("traces")
    settings = {"adapter": {"budget": 700}, "trace_dir": str(traces)}
    options = {**EXACT, "additional_config": {"moe_tta": settings}}
    with engine(tiny_models("mixtral"), **options) as llm:
        llm.traces = traces
        yield llm


def adapter_loss(model, tokens):
    """Return what the adapter minimises, vectors [L, E] -> loss."""
    size = len(model.shape.layers), model.shape.num_experts
    texts = PackedTexts.of([tokens], model.device)
    with torch.no_grad():
        hidden = survey(model, texts, torch.zeros(1, *size)).inputs[0]
    tail = Tail(model, texts, hidden, lowest=0, skip=0)
    return lambda bias: tail.loss(bias[None])[0]


@torch.no_grad()
def test_a_round_is_the_adapters(llm, heard, tiny_models):
    """The same directions, and losses that differ by rounding.

    Losses that are e apart move an estimate by e / radius at most, and a step by `lr`
    times that.
    """
    layers = llm.llm_engine.input_processor.moe_tta.shape.layers
    adapter = AdapterModel.from_checkpoint(tiny_models("mixtral"), torch.float32)
    asked = {**SPSA, "steps": 1}
    settings = Rerouting(**asked, layers=layers)
    zeros = torch.zeros(1, len(layers), adapter.shape.num_experts)
    for prompt in draw_prompts(3, random.Random(5)):
        heard.probes.clear()
        output = complete(llm, prompt, sampling(1, {"reroute": {**asked, "every": 0}}))
        loss, probes = adapter_loss(adapter, prompt), list(heard.probes.values())
        said = [(float(-p.scores.mean()), float(loss(p.bias))) for p in probes]
        apart = max(abs(engine - adapters) for engine, adapters in said)
        assert apart <= FLOAT32, said
        [done] = reroute(adapter, [prompt], zeros, settings)
        assert done.outcome is Outcome.ADAPTED
        assert done.delta.abs().max() > 0.1
        moved = (heard.edits[-1] - done.delta).abs().max()
        assert moved <= settings.lr * apart / settings.radius + EPS
        [report] = output.outputs[0].moe_tta["rounds"]
        assert report["losses"] == pytest.approx(done.losses, abs=FLOAT32)


def test_beside_rounds_of_the_adapter(llm):
    """One queue for both, and each as it is alone."""
    prompts = draw_prompts(4, random.Random(8))
    params = [sampling(TOKENS, r) for r in (ROUNDS, ADAM, ADAM, ROUNDS)]
    alone = [
        generate(llm, [prompt], [asked])[0]
        for prompt, asked in zip(prompts, params, strict=True)
    ]
    assert generate(llm, prompts, params) == alone
    check_empty(llm)


def test_the_outside_hears_nothing(llm, monkeypatch):
    """Neither outputs nor counts of requests, tokens and cache hits name a probe."""
    told, counted, known = [], [], scheduler_of(llm)
    process, make_stats = OutputProcessor.process_outputs, known.make_stats

    def processed(self, outputs, *args, **kwargs):
        told.extend(output.request_id for output in outputs)
        return process(self, outputs, *args, **kwargs)

    def counted_stats(*args, **kwargs):
        stats = make_stats(*args, **kwargs)
        names = ("running", "waiting", "skipped_waiting")
        found = sum(getattr(stats, f"num_{name}_reqs") for name in names)
        counted.append((len(known._probes), found))
        return stats

    monkeypatch.setattr(OutputProcessor, "process_outputs", processed)
    monkeypatch.setattr(known, "make_stats", counted_stats)
    before = counters(llm)
    prompts = draw_prompts(3, random.Random(9))
    generate(llm, prompts, [sampling(TOKENS, r) for r in (ROUNDS, None, ROUNDS)])
    after = counters(llm)
    assert len(told) >= 3
    assert not any(PROBE in request_id for request_id in told)
    assert max(probes for probes, _ in counted) == 8
    assert all(0 <= found <= 3 for _, found in counted)
    read = after["vllm:prompt_tokens"] - before["vllm:prompt_tokens"]
    assert read == sum(map(len, prompts))
    asked = after["vllm:prefix_cache_queries"] - before["vllm:prefix_cache_queries"]
    assert asked == read
    check_empty(llm)
    traces = [path.name for path in llm.traces.iterdir()]
    assert len(traces) >= 3
    assert not any("probe" in name for name in traces)


def test_probes_read_and_leave_no_cached_block(llm):
    llm.reset_prefix_cache()
    output = complete(llm, PROMPT, sampling(1, {"reroute": {**SPSA, "every": 0}}))
    assert output.num_cached_tokens == 0
    pool = scheduler_of(llm).kv_cache_manager.block_pool
    cached = [block for block in pool.blocks if block.block_hash is not None]
    assert len(cached) == 1  # the prompt's only whole block
    again = complete(llm, PROMPT, sampling(1, {"reroute": {**SPSA, "every": 0}}))
    assert again.num_cached_tokens == 32
    assert outputs(again) == outputs(output)


def step_until(llm, done):
    while not done():
        llm.llm_engine.step()


@pytest.mark.parametrize("mode", ["wait", "overlap"])
def test_an_abort_ends_the_probes(llm, mode):
    core, scheduler = llm.llm_engine, scheduler_of(llm)
    asked = {"reroute": {**ROUNDS["reroute"], "mode": mode}}
    core.add_request("gone", {"prompt_token_ids": PROMPT}, sampling(20, asked))
    core.add_request("stays", {"prompt_token_ids": PROMPT[:9]}, sampling(30))
    step_until(llm, lambda: scheduler._probes)
    assert status(llm)["requests_with_plan"] > 0
    core.abort_request(["gone"])
    assert not scheduler._probes
    assert [name.split("-")[0] for name in scheduler.requests] == ["stays"]
    step_until(llm, lambda: not core.has_unfinished_requests())
    check_empty(llm)


def test_an_end_before_the_round_ends_the_probes(llm, monkeypatch):
    """An overlapped request is done before its probes, which run one a step."""
    scheduler = scheduler_of(llm)
    monkeypatch.setattr(scheduler, "max_num_active_reqs", 2)
    asked = {"reroute": {**SPSA, "every": 0, "mode": "overlap"}}
    output = complete(llm, PROMPT, sampling(4, asked))
    assert output.outputs[0].moe_tta is None
    monkeypatch.undo()
    check_empty(llm)


def test_one_step_is_paid_for_at_a_time(llm, monkeypatch):
    """Tokens read by probes, beside a request that decodes, stay within the budget."""
    scheduler, read, credit = scheduler_of(llm), [], 100
    monkeypatch.setattr(scheduler.rounds, "_budget", credit)
    schedule = scheduler.schedule

    def scheduled(*args, **kwargs):
        output = schedule(*args, **kwargs)
        counts = output.num_scheduled_tokens
        read.append(sum(n for name, n in counts.items() if PROBE in name))
        return output

    monkeypatch.setattr(scheduler, "schedule", scheduled)
    prompts = [PROMPT[:30], PROMPT]
    generate(llm, prompts, [sampling(60), sampling(2, ROUNDS)])
    unit = 8 * len(PROMPT)
    assert sum(read) == 2 * unit + len(PROMPT)
    busy = next(i for i, count in enumerate(read) if count)
    for steps in range(busy, len(read)):
        assert sum(read[: steps + 1]) <= credit * (steps + 1)


FAILURES = [
    (lambda output: np.full(59, np.nan), "loss or gradient not finite"),
    (lambda output: None, "failed"),
]


@pytest.mark.parametrize(("scores", "outcome"), FAILURES)
def test_what_fails_goes_on_unadapted(llm, monkeypatch, scores, outcome):
    plain = generate(llm, [PROMPT], [sampling(7)])
    monkeypatch.setattr(probe_scheduler, "token_scores", scores)
    output = complete(llm, PROMPT, sampling(7, ROUNDS))
    assert [outputs(output)] == plain
    [report] = output.outputs[0].moe_tta["rounds"]
    assert report["outcome"] == outcome
    if outcome != "failed":
        assert report["losses"] == [None] * 3
    monkeypatch.undo()
    check_empty(llm)


def test_a_job_that_raises_ends_its_round_alone(llm, monkeypatch):
    plain = generate(llm, [PROMPT], [sampling(7)])

    def broken(text, shape, number, arguments):
        yield from ()
        raise RuntimeError("told to")

    monkeypatch.setitem(probe_jobs.JOBS, "reroute", broken)
    output = complete(llm, PROMPT, sampling(7, ROUNDS))
    assert [outputs(output)] == plain
    assert output.outputs[0].moe_tta["rounds"][0]["outcome"] == "failed"


def test_nothing_to_score(llm):
    asked = {"reroute": {**SPSA, "every": 8, "skip": 9}}
    output = complete(llm, [7], sampling(12, asked))
    rounds = output.outputs[0].moe_tta["rounds"]
    assert [r["outcome"] for r in rounds] == ["no token to score"] * 2
    assert outputs(output) == generate(llm, [[7]], [sampling(12)])[0]
