# SPDX-License-Identifier: Apache-2.0
"""spsa where no gradient passes: weights cut over two GPUs, and quantised ones."""

import logging
import random

import numpy as np
import pytest
import torch

from tests.gpu.test_parallel import OPTIONS
from tests.plugin.engine import engine, sampling
from tests.plugin.test_reroute import draw_prompts
from tests.plugin.test_reroute_crowd import scheduler_of

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device"
)
log = logging.getLogger(__name__)
SETTINGS = {"additional_config": {"moe_tta": {"adapter": {"gradients": False}}}}
PROMPTS = draw_prompts(6, random.Random(3))
SPSA = {"optimizer": "spsa", "every": 8, "steps": 2, "lr": 2.0}


def ask(llm, request, **options):
    return llm.generate(
        [{"prompt_token_ids": prompt} for prompt in PROMPTS],
        sampling(20, request, **options),
        use_tqdm=False,
    )


def rounds(llm, **asked):
    """Return each request's reports, all of rounds that went well."""
    found = [
        output.outputs[0].moe_tta["rounds"]
        for output in ask(llm, {"reroute": {**SPSA, **asked}})
    ]
    reports = [report for of_one in found for report in of_one]
    assert {report["outcome"] for report in reports} == {"adapted"}
    assert not scheduler_of(llm)._probes
    return found


def plain_losses(llm):
    """Return each prompt's loss as an ordinary request learns it."""
    losses = []
    found = ask(llm, None, prompt_logprobs=0)
    for output, prompt in zip(found, PROMPTS, strict=True):
        rows = zip(output.prompt_logprobs[1:], prompt[1:], strict=True)
        losses.append(-np.mean([row[token].logprob for row, token in rows]))
    return losses


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", ["mixtral", "granitemoe"])
def test_two_gpus_take_the_losses_of_one(tiny_models, name):
    """The first step asks at the same points; plain losses say what rounding does."""
    first, plain = [], []
    for gpus in (1, 2):
        options = {**OPTIONS, **SETTINGS, "tensor_parallel_size": gpus}
        with engine(tiny_models(name), **options) as llm:
            first.append([one[0]["losses"][0] for one in rounds(llm)])
            plain.append(plain_losses(llm))
    apart, floor = (np.abs(np.subtract(*pair)).max() for pair in (first, plain))
    log.info("%s: losses of probes %.1e apart, plain ones %.1e", name, apart, floor)
    assert apart <= 4 * floor + 1e-6


def test_quantised_weights(tiny_models):
    """At rate 0 the last probe is the model itself, read as any prompt is."""
    options = {**OPTIONS, **SETTINGS, "dtype": "bfloat16", "quantization": "fp8"}
    with engine(tiny_models("qwen3_moe"), **options) as llm:
        plain = plain_losses(llm)
        still = [one[0]["losses"][-1] for one in rounds(llm, lr=0.0)]
        moved = [one[0]["losses"] for one in rounds(llm)]
    # bfloat16's rounding of logits of up to 16, in another batch
    np.testing.assert_allclose(still, plain, rtol=0, atol=16 * 2**-8)
    assert np.isfinite(moved).all()
