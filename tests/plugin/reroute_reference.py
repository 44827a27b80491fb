# SPDX-License-Identifier: Apache-2.0
"""Online rerouting as a plain loop: adapt, then decode with a plan for every row."""

import bisect
from dataclasses import replace

import numpy as np
import torch

from moe_tta.adapter import AdapterModel, Outcome, Rerouting, reroute
from moe_tta.compile import compile_request
from moe_tta.plan import RoutingPlan, merge
from moe_tta.replica import routed_rows
from moe_tta.spec import parse
from moe_tta.strategies import PlanContext
from tests.plugin.contrast_reference import load


class Loop:
    """One model, read by transformers and by the adapter, float32.

    `leads` tells how far the best logit was above the second at each token of the
    last text.
    """

    def __init__(self, path, shape, adapter=None):
        self.adapter = adapter or AdapterModel.from_checkpoint(path, torch.float32)
        self.lm, self.shape = load(path).to(self.adapter.device), shape
        self.leads = []

    def generate(self, request, prompt, count, starts=None):
        """Return `count` greedy tokens and the vectors of each round.

        Args:
            request: A `moe_tta` object with reroute, and perhaps steer and so on.
            prompt: Token ids.
            count: How many tokens.
            starts: First row of each round's version; default the context's last.
        """
        spec = parse(request, presets={})
        params = spec.rounds.params
        compiled = compile_request(spec, PlanContext(self.shape))
        own, settings = compiled.plans, Rerouting(**compiled.rounds.work.arguments)
        delta = torch.zeros(len(self.shape.layers), self.shape.num_experts)
        text, begins, vectors, done = list(prompt), [0], [delta], 0
        self.leads = []
        for _ in range(count):
            due = len(prompt) + done * params.every
            if len(text) == due and (params.every or not done):
                # a plan has no say in the adapter: its vectors are the model's own
                settings = replace(settings, seed=done)  # read by spsa alone
                [found] = reroute(self.adapter, [text], vectors[-1][None], settings)
                assert found.outcome is Outcome.ADAPTED
                vectors.append(found.delta.cpu())
                begins.append(len(text) - 1 if starts is None else starts[done])
                done += 1
            text.append(self._next(text, len(prompt), own, begins, vectors))
        return text[len(prompt) :], vectors[1:]

    @torch.inference_mode()
    def _next(self, text, prompt_len, own, begins, vectors):
        plans = [_with_bias(plan, delta) for delta in vectors for plan in own]

        def plan_of(positions):
            rows = positions.tolist()
            segments = [(p >= prompt_len - 1) + (p >= prompt_len) for p in rows]
            versions = [bisect.bisect_right(begins, p) - 1 for p in rows]
            places = zip(segments, versions, strict=True)
            found = [s + 3 * v for s, v in places]
            return torch.tensor(found, dtype=torch.int32, device=positions.device)

        tokens = torch.tensor([text], device=self.adapter.device)
        with routed_rows(self.lm, self.shape, plans, plan_of):
            logits = self.lm(tokens).logits[0, -1]
        first, second = logits.topk(2).values.tolist()
        self.leads.append(first - second)
        return int(logits.argmax())


def _with_bias(plan, delta):
    own = plan or RoutingPlan()
    bias = delta.numpy() if own.bias is None else own.bias + delta.numpy()
    rest = {name: value for name, value in own.arrays().items() if name != "bias"}
    return merge([RoutingPlan(**rest), RoutingPlan(bias=np.asarray(bias))])
