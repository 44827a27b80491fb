# SPDX-License-Identifier: Apache-2.0
"""A round by units is the round in one go, and leaves nothing running between."""

import pytest
import torch

from moe_tta.adapter import AdapterModel, Outcome, RerouteJob, Rerouting, reroute
from moe_tta.adapter.job import warm_up
from moe_tta.adapter.tail import Tail
from tests.adapter.test_rounds import zeros


@pytest.fixture
def model(tiny_models):
    return AdapterModel.from_checkpoint(tiny_models("mixtral"))


@pytest.mark.parametrize("last_loss", [True, False])
@pytest.mark.parametrize("optimizer", ["adam", "spsa"])
def test_units_add_up_to_the_round(model, draw, optimizer, last_loss):
    texts = [draw.tokens(20), draw.tokens(9)]
    settings = Rerouting(steps=3, optimizer=optimizer, pairs=2, last_loss=last_loss)
    job = RerouteJob(model, texts, zeros(model, 2), settings)
    with torch.inference_mode():
        for _ in settings.passes:
            assert not job.done
            job.advance()
            assert torch.is_inference_mode_enabled()
            assert not torch.is_grad_enabled()
    assert job.done
    job.advance()  # nothing is left: no error
    whole = reroute(model, texts, zeros(model, 2), settings)
    for by_units, at_once in zip(job.result(), whole, strict=True):
        assert torch.equal(by_units.delta, at_once.delta)
        assert by_units.losses == at_once.losses
        assert by_units.outcome is Outcome.ADAPTED


def test_jobs_that_take_turns_do_not_meet(model, draw):
    texts = [draw.tokens(20), draw.tokens(13)]
    settings = Rerouting(steps=2)
    jobs = [RerouteJob(model, [text], zeros(model, 1), settings) for text in texts]
    for _ in settings.passes:
        for job in jobs:
            job.advance()
    for text, job in zip(texts, jobs, strict=True):
        [alone] = reroute(model, [text], zeros(model, 1), settings)
        assert torch.equal(job.result()[0].delta, alone.delta)


def test_passes_count_forwards():
    assert Rerouting(steps=2).passes == (2, 2, 1)
    assert Rerouting(steps=2, last_loss=False).passes == (2, 2)
    assert Rerouting(steps=1, recompute=True).passes == (3, 1)
    assert Rerouting(steps=1, optimizer="spsa", pairs=4).passes == (1, 8, 1)


def test_memory_that_runs_out_ends_the_job(model, draw, monkeypatch):
    def full(self, delta):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(Tail, "gradient", full)
    job = RerouteJob(model, [draw.tokens(9)], zeros(model, 1), Rerouting())
    job.advance()  # a pass that surveys and is a step
    assert not job.done
    job.advance()
    assert job.done
    assert job.result()[0].outcome is Outcome.OUT_OF_MEMORY


def test_warmth_is_a_round_of_two_texts(model, monkeypatch):
    """Forward and backward, in one pass with a survey and in one of the tail."""
    ran = []
    for name in ("gradient", "value"):
        run = getattr(Tail, name)

        def watch(self, delta, name=name, run=run):
            ran.append((name, len(delta)))
            return run(self, delta)

        monkeypatch.setattr(Tail, name, watch)
    with torch.inference_mode():
        warm_up(model)
    assert ran == [("gradient", 2), ("value", 2)]


def test_warmth_that_finds_no_memory_stops_nobody(model, monkeypatch):
    def full(self, delta):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(Tail, "gradient", full)
    warm_up(model)
