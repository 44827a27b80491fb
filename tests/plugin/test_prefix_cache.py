# SPDX-License-Identifier: Apache-2.0
"""KV made under one plan is never served to a request under another."""

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from tests.plugin.engine import engine

PROMPT = list(range(2, 2 + 130))
A = {"steer": {"demote": [[0, 1]]}}
B = {"dynamic_k": {"k": 1}}


@pytest.fixture(scope="module")
def llm(tiny_models):
    options = {"dtype": "float32", "enable_prefix_caching": True}
    with engine(tiny_models("mixtral"), **options) as llm:
        yield llm


@pytest.fixture(autouse=True)
def _empty_cache(llm):
    llm.reset_prefix_cache()


def cached(llm, spec=None, prompt=PROMPT, tokens=2, salt=None):
    """Generate and return how many prompt tokens came from the cache."""
    params = SamplingParams(
        max_tokens=tokens,
        temperature=0,
        ignore_eos=True,
        extra_args=None if spec is None else {"moe_tta": spec},
    )
    request = {"prompt_token_ids": prompt}
    if salt is not None:
        request["cache_salt"] = salt
    (output,) = llm.generate([request], params, use_tqdm=False)
    return output.num_cached_tokens


def test_plans_do_not_meet(llm):
    assert [cached(llm, spec) for spec in (A, B, None)] == [0, 0, 0]
    assert [cached(llm, spec) for spec in (A, B, None)] == [128, 128, 128]


def test_equal_plans_share(llm):
    assert cached(llm, {"steer": {"bias": [[0, 1, 2.0]], "strength": 1.0}}) == 0
    assert cached(llm, {"steer": {"bias": [[0, 1, 1.0]], "strength": 2.0}}) == 128


def test_neutral_requests_share_with_stock(llm):
    assert cached(llm) == 0
    assert cached(llm, {}) == 128
    assert cached(llm, {"dynamic_k": {"k": 2}}) == 128


def test_last_layer_alone_shares_with_stock(llm):
    assert cached(llm) == 0
    assert cached(llm, {"steer": {"demote": [[3, 1]]}}) == 128


@pytest.mark.parametrize("span", ["prompt", "generated", "last_prompt"])
def test_partial_spans_need_the_same_prompt_length(llm, span):
    spec = {"steer": {"demote": [[0, 1]], "span": span}}
    assert cached(llm, spec) == 0
    assert cached(llm, spec) == 128
    assert cached(llm, spec, [*PROMPT, 9]) == 0


def test_whole_span_shares_prefixes(llm):
    assert cached(llm, A) == 0
    assert cached(llm, A, [*PROMPT, 9]) == 128


def test_client_salt_is_joined(llm):
    assert cached(llm, A, salt="tenant-1") == 0
    assert cached(llm, A, salt="tenant-2") == 0
    assert cached(llm, A) == 0
    assert cached(llm, A, salt="tenant-1") == 128


def test_clients_cannot_imitate_a_salt(llm):
    with pytest.raises(VLLMValidationError, match="cache_salt"):
        cached(llm, None, salt="moe-tta:0123")
