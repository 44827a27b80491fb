# SPDX-License-Identifier: Apache-2.0
"""Self-contrast in other families and with a real vocabulary."""

import random

import pytest

from tests.plugin import contrast_reference
from tests.plugin.engine import engine, generate, sampling
from tests.plugin.test_contrast import EXACT, TOKENS, check_greedy


@pytest.mark.parametrize("name", ["olmoe", "qwen2_moe", "qwen3_moe"])
def test_other_families(tiny_models, name):
    with engine(tiny_models(name), **EXACT) as llm:
        check_greedy(llm, tiny_models(name), {"rank": 2}, 30)


def test_lab_model(lab):
    """A real vocabulary, in float32: every token is the reference's best one.

    In bfloat16 the reference itself moves by whole logits (docs/log.md): no bound on
    it could tell a contrast from none.
    """
    model, request = lab("smollm2-moe"), {"contrast": {"weak": {"rank": 2}, "beta": 1}}
    rng = random.Random(5)
    prompts = [[rng.randrange(2, 40000) for _ in range(20)] for _ in range(8)]
    with engine(model, **EXACT) as llm:
        shape = llm.llm_engine.input_processor.moe_tta.shape
        answers = generate(llm, prompts, [sampling(TOKENS, request)] * len(prompts))
        plain = generate(llm, prompts, [sampling(TOKENS)] * len(prompts))
    reference = contrast_reference.load(model)
    for prompt, (tokens, _) in zip(prompts, answers, strict=True):
        wanted = contrast_reference.combined(reference, shape, request, prompt, tokens)
        assert wanted.argmax(1).tolist() == tokens
    assert [tokens for tokens, _ in plain] != [tokens for tokens, _ in answers]
