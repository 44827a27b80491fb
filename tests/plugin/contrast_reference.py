# SPDX-License-Identifier: Apache-2.0
"""SCMoE as its authors run it: one model, two routings, two KV caches, plain torch."""

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from moe_tta.compile import compile_request
from moe_tta.kernels.contrast import contrast_logits
from moe_tta.replica import routed
from moe_tta.spec import parse
from moe_tta.strategies import PlanContext


class Stream:
    """One routing's reader of a growing text."""

    def __init__(self, model, shape, plans, prompt_len):
        self.model, self.shape, self.plans = model, shape, plans
        self.prompt_len = prompt_len
        self.cache, self.seen = DynamicCache(config=model.config), 0

    @torch.inference_mode()
    def read(self, tokens):
        """Return the logits [V] after some more tokens."""
        with routed(
            self.model, self.shape, self.plans, self.prompt_len, start=self.seen
        ):
            output = self.model(torch.tensor([tokens]), past_key_values=self.cache)
        self.seen += len(tokens)
        return output.logits[0, -1]


def load(path):
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, experts_implementation="eager"
    )


@torch.inference_mode()
def alone(model, shape, plans, prompt, tokens):
    """Return one stream's logits [len(tokens), V] on a given answer, without cache."""
    text = torch.tensor([prompt + tokens[:-1]])
    with routed(model, shape, plans, len(prompt)):
        return model(text).logits[0, len(prompt) - 1 :]


def streams(model, shape, request, prompt, tokens):
    """Return the strong and the weak logits on a given answer, and the numbers."""
    compiled = compile_request(parse(request, presets={}), PlanContext(shape))
    both = [
        alone(model, shape, plans, prompt, tokens)
        for plans in (compiled.plans, compiled.pair.weak.plans)
    ]
    return *both, compiled.pair.numbers


def combined(model, shape, request, prompt, tokens):
    """Return the combined logits [len(tokens), V] on a given answer."""
    strong, weak, numbers = streams(model, shape, request, prompt, tokens)
    return contrast_logits(strong, weak, *numbers)


def greedy(model, shape, request, prompt, count):
    """Return the tokens, and each step's lead of the best token over the second."""
    compiled = compile_request(parse(request, presets={}), PlanContext(shape))
    beta, alpha = compiled.pair.numbers
    strong = Stream(model, shape, compiled.plans, len(prompt))
    weak = Stream(model, shape, compiled.pair.weak.plans, len(prompt))
    tokens, leads, text = [], [], prompt
    for _ in range(count):
        logits = contrast_logits(
            strong.read(text)[None], weak.read(text)[None], beta, alpha
        )[0]
        best = logits.topk(2)
        leads.append(float(best.values[0] - best.values[1]))
        tokens.append(int(best.indices[0]))
        text = tokens[-1:]
    return tokens, leads
