# SPDX-License-Identifier: Apache-2.0
"""Self-contrast end to end: vLLM equals the plain two-cache loop, token for token."""

import logging
import random

import pytest

from tests.plugin import contrast_reference
from tests.plugin.engine import engine, generate, sampling

TOKENS = 10
NUM_PROMPTS = 200
EXACT = {"dtype": "float32", "max_model_len": 128, "block_size": 32}
WEAK = {
    "rank": {"rank": 2},
    "k": {"k": 1},
    "custom": {
        "steer": {"bias": [[0, 1, 3.0]], "demote": [[2, 3], [3, 0]]},
        "dynamic_k": {"p": 0.3, "span": "generated"},
    },
}
log = logging.getLogger(__name__)


def draw_prompts(count):
    rng = random.Random(11)
    return [
        [rng.randrange(2, 256) for _ in range(rng.randrange(2, 40))]
        for _ in range(count)
    ]


def contrast(weak, tokens=TOKENS, options=None, **members):
    request = {"contrast": {"weak": weak, **members}}
    return sampling(tokens, request, **(options or {}))


@pytest.fixture(scope="module")
def llm(tiny_models):
    with engine(tiny_models("mixtral"), **EXACT) as llm:
        yield llm


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", WEAK)
def test_greedy_equals_two_caches(llm, tiny_models, name):
    check_greedy(llm, tiny_models("mixtral"), WEAK[name], NUM_PROMPTS)


def check_greedy(llm, model, weak, count):
    prompts = draw_prompts(count)
    answers = generate(llm, prompts, [contrast(weak)] * count)
    shape = llm.llm_engine.input_processor.moe_tta.shape
    reference = contrast_reference.load(model)
    request = {"contrast": {"weak": weak}}
    for prompt, (tokens, _) in zip(prompts, answers, strict=True):
        want, leads = contrast_reference.greedy(
            reference, shape, request, prompt, TOKENS
        )
        assert tokens == want, (prompt, leads)
    plain = generate(llm, prompts, [sampling(TOKENS)] * count)
    changed = sum(a[0] != b[0] for a, b in zip(answers, plain, strict=True))
    log.info("%s: %d of %d texts differ from plain", weak, changed, count)
    assert changed > count / 2


def test_equal_streams_are_the_model(llm):
    """Nothing to contrast, nothing cut off: stock tokens and logprobs, bit for bit."""
    prompts = draw_prompts(24)
    plain = generate(llm, prompts, [sampling(TOKENS)] * 24)
    cases = [
        {"weak": {"rank": 2}, "beta": 0},
        {"weak": {}, "beta": 2},
        {"weak": {"dynamic_k": {"k": 1}}, "strong": {}, "beta": 0},
    ]
    for case in cases:
        params = [contrast(alpha=0, **case)] * 24
        assert generate(llm, prompts, params) == plain, case
    same = {"dynamic_k": {"k": 1}}
    strong = generate(llm, prompts, [sampling(TOKENS, same)] * 24)
    assert strong != plain
    params = [contrast(same, strong=same, alpha=0, beta=2)] * 24
    assert generate(llm, prompts, params) == strong
    # plausibility alone never changes the best token
    cut = generate(llm, prompts, [contrast({"rank": 2}, beta=0)] * 24)
    assert [tokens for tokens, _ in cut] == [tokens for tokens, _ in plain]


def test_each_of_n_completions_is_contrasted(llm):
    """In one process they share their parameters; top_k 1 is greedy again."""
    prompt, weak = draw_prompts(1)[0], {"rank": 2}
    twice = {"n": 2, "temperature": 1.0, "top_k": 1}
    [output] = llm.generate(
        [{"prompt_token_ids": prompt}],
        contrast(weak, options=twice),
        use_tqdm=False,
    )
    [(alone, _)] = generate(llm, [prompt], [contrast(weak)])
    assert [list(c.token_ids) for c in output.outputs] == [alone, alone]
    [(plain, _)] = generate(llm, [prompt], [sampling(TOKENS)])
    assert alone != plain


def test_one_stream_ends_short_of_the_other_in_the_cache(llm):
    """Prefix hits differ between the streams; the answer does not."""
    llm.reset_prefix_cache()
    prompt = draw_prompts(1)[0][:1] * 2 + list(range(2, 2 + 95))
    (first,) = generate(llm, [prompt], [contrast({"rank": 2})])
    for cached in (prompt, prompt[:65], prompt[:64]):
        for params in (sampling(1), contrast({"rank": 2}, tokens=1)):
            llm.reset_prefix_cache()
            generate(llm, [cached], [params])
            (again,) = generate(llm, [prompt], [contrast({"rank": 2})])
            assert again == first
