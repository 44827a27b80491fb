# SPDX-License-Identifier: Apache-2.0
"""What rounds by probes asked and heard, and the same from transformers."""

from dataclasses import dataclass, field

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_tta.adapter import Rerouting
from moe_tta.adapter.choice import named_choice
from moe_tta.adapter.spsa import spsa_descent
from moe_tta.plan import RoutingPlan
from moe_tta.replica import routed, routed_rows
from moe_tta.vllm_plugin import probe_scheduler
from moe_tta.vllm_plugin.probes import ProbeRound


@dataclass
class Probed:
    """One probe: its text, the vectors [L, E] and what the engine said [T - 1]."""

    tokens: list
    bias: torch.Tensor
    scores: torch.Tensor = None


@dataclass
class Heard:
    """All probes of an engine in this process, and the edits that came of them."""

    probes: dict = field(default_factory=dict)  # by id, in the order they were made
    edits: list = field(default_factory=list)

    def record(self, patch):
        make, take = probe_scheduler.make_probe, ProbeRound.take
        finish = probe_scheduler.ProbeScheduler._finish

        def make_probe(owner, tokens, edit, number):
            probe = make(owner, tokens, edit, number)
            bias = torch.tensor(edit.fields["bias"])
            self.probes[probe.request_id] = Probed(list(tokens), bias)
            return probe

        def taken(this, probe_id, scores):
            if scores is not None:
                self.probes[probe_id].scores = torch.tensor(scores)
            return take(this, probe_id, scores)

        def finished(this, done):
            self.edits.append(torch.tensor(done.result.edit.fields["bias"]))
            return finish(this, done)

        patch.setattr(probe_scheduler, "make_probe", make_probe)
        patch.setattr(ProbeRound, "take", taken)
        patch.setattr(probe_scheduler.ProbeScheduler, "_finish", finished)
        return self


@pytest.fixture
def heard(monkeypatch):
    """Records what this test's engines ask and hear."""
    return Heard().record(monkeypatch)


def complete(llm, prompt, params):
    [output] = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    return output


class Replica:
    """A transformers model under vectors [L, E] in every row."""

    def __init__(self, path, shape, dtype=torch.float32):
        self.shape = shape
        # grouped matrix products know no float64
        self.lm = AutoModelForCausalLM.from_pretrained(
            path, experts_implementation="eager", dtype=dtype
        )

    @torch.inference_mode()
    def scores(self, tokens, bias):
        """Return log P of the tokens but the first, [T - 1], in float64."""
        plan = RoutingPlan(bias=bias.numpy()) if bias.any() else None
        with routed(self.lm, self.shape, (plan,) * 3, len(tokens)):
            logits = self.lm(torch.tensor([tokens])).logits[0, :-1]
        wanted = torch.tensor(tokens[1:])[:, None]
        wide = torch.promote_types(logits.dtype, torch.float32)
        return torch.log_softmax(logits.to(wide), -1).gather(1, wanted)[:, 0].double()

    @torch.inference_mode()
    def greedy(self, prompt, count, starts, vectors):
        """Return greedy tokens where the n-th vectors hold from the n-th start on."""
        plans = [None, *(RoutingPlan(bias=bias.numpy()) for bias in vectors)]
        edges = torch.tensor(starts)

        def plan_of(positions):
            return torch.searchsorted(edges, positions, right=True).int()

        text = list(prompt)
        for _ in range(count):
            with routed_rows(self.lm, self.shape, plans, plan_of):
                logits = self.lm(torch.tensor([text])).logits[0, -1]
            text.append(int(logits.argmax()))
        return text[len(prompt) :]


def rerun(shape, arguments, number, start, probes):
    """Return a round's descent again, from what its probes said.

    Args:
        shape: The model's routers.
        arguments: `Rerouting`'s.
        number: Of the round.
        start: Vectors [L, E] that it began with.
        probes: In the order in which they were asked; each must be what is asked here.
    """
    settings = Rerouting(**arguments)
    places = [shape.layers.index(layer) for layer in settings.layers]
    rates = named_choice((1, len(shape.layers)), places, start.device).float()
    generator = torch.Generator().manual_seed(settings.seed + number)
    asking = spsa_descent(
        start[None],
        rates,
        settings.lr,
        settings.steps,
        settings.clip,
        settings.radius,
        settings.pairs,
        generator,
    )
    points, left = next(asking), list(probes)
    while True:
        now, left = left[: len(points)], left[len(points) :]
        for point, probe in zip(points[:, 0], now, strict=True):
            assert torch.equal(point, probe.bias)
        scored = [-probe.scores[max(settings.skip - 1, 0) :].mean() for probe in now]
        try:
            points = asking.send(torch.stack(scored)[:, None])
        except StopIteration as end:
            assert not left
            return end.value
