# SPDX-License-Identifier: Apache-2.0
"""Admission without an engine: bodies seen before, and what vLLM is handed."""

import json
import random
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from moe_tta.compile import compile_request
from moe_tta.spec import parse
from moe_tta.vllm_plugin import admission as admission_module
from moe_tta.vllm_plugin.admission import Admission
from moe_tta.vllm_plugin.api_seams import admit
from moe_tta.vllm_plugin.plan_cache import PlanCache
from moe_tta.vllm_plugin.texts import PromptReader
from tests.requests import random_request

BIAS = {"steer": {"bias": [[0, 1, 0.5], [1, 2, -1.0]]}}
PRESETS = {"calm": {"steer": {"demote": [[0, 1]], "span": "prompt"}}}


def make(allow_inline=True):
    config = SimpleNamespace(
        model_type="olmoe",
        num_hidden_layers=4,
        num_experts=16,
        num_experts_per_tok=4,
    )
    settings = {"allow_inline": allow_inline, "presets": PRESETS, "k_max": 6}
    return Admission(
        SimpleNamespace(
            additional_config={"moe_tta": settings},
            model_config=SimpleNamespace(hf_text_config=config),
        )
    )


def process(self, request_id, prompt, params, *args, **kwargs):
    """Do what vLLM does that matters here; keep what it was handed."""
    self.handed = params
    return SimpleNamespace(
        sampling_params=params.clone(),
        cache_salt=kwargs["salt"],
        prompt_token_ids=prompt,
    )


def admitted(admission, value, prompt_len=9, salt=None, **extra_args):
    """Return the engine's request, and the parameters vLLM's own code saw."""
    params = SamplingParams(extra_args={"moe_tta": value, **extra_args})
    processor = SimpleNamespace(moe_tta=admission)
    processor.moe_tta_reader = PromptReader(processor)
    request = admit(process)(processor, "id", range(prompt_len), params, salt=salt)
    assert params.extra_args == {"moe_tta": value, **extra_args}
    return request, processor.handed


def outcome(admission, value, prompt_len=9, salt=None):
    request, _ = admitted(admission, value, prompt_len, salt)
    return (request.sampling_params.extra_args or {}).get("moe_tta"), request.cache_salt


def uncached(admission, value, prompt_len, salt):
    spec = parse(value, presets=admission.settings.presets)
    compiled = compile_request(spec, admission.context)
    own = compiled.salt(prompt_len, salt)
    wire = None if compiled.neutral else compiled.to_wire()
    return wire, salt if own is None else own


def test_seen_bodies_get_the_same_wire_form_and_salt():
    admission, rng = make(), random.Random(0)
    values = [random_request(rng, admission.shape) or {} for _ in range(150)]
    values += [{}, "calm"]
    for prompt_len, salt in ((9, None), (9, "mine"), (1, None)):
        for value in values:
            want = uncached(admission, value, prompt_len, salt)
            text = value if isinstance(value, str) else json.dumps(value, indent=1)
            for form in (value, text):
                assert outcome(admission, form, prompt_len, salt) == want


def test_a_body_is_compiled_once(monkeypatch):
    compiled = []

    def count(spec, context):
        compiled.append(spec)
        return compile_request(spec, context)

    admission = make()
    monkeypatch.setattr(admission_module, "compile_or_defer", count)
    for prompt_len in (3, 9):
        admitted(admission, BIAS, prompt_len)
        admitted(admission, json.dumps(BIAS), prompt_len)
    assert len(compiled) == len(admission.cache) == 1


def test_requests_share_nothing_that_can_change():
    admission = make()
    before = outcome(admission, BIAS)
    request, _ = admitted(admission, BIAS)
    wire = request.sampling_params.extra_args["moe_tta"]
    wire["plans"].clear()
    wire["segments"][0] = None
    wire["prompt_tokens"] = 99
    assert outcome(admission, BIAS) == before


@pytest.mark.parametrize(
    ("allow_inline", "value"),
    [
        (True, {"steer": {"bias": [[0, 99, 1.0]]}}),
        (True, '{"dynamic_k": {"k": 1, "k": 2}}'),
        (True, "no such preset"),
        (True, 3),
        (False, BIAS),
    ],
)
def test_refused_bodies_are_refused_again(allow_inline, value):
    admission = make(allow_inline)
    for _ in range(2):
        with pytest.raises(VLLMValidationError):
            admitted(admission, value)
    assert len(admission.cache) == 0


def test_what_the_operator_allows_does_not_leak_between_engines():
    admitted(make(allow_inline=True), BIAS)
    with pytest.raises(VLLMValidationError, match="inline"):
        admitted(make(allow_inline=False), BIAS)


@pytest.mark.parametrize("value", [BIAS, {}, "calm"])
def test_vllm_copies_no_object_of_ours(value):
    request, handed = admitted(make(), value, other="kept")
    assert handed.extra_args == {"other": "kept"}
    assert request.sampling_params.extra_args["other"] == "kept"
    _, handed = admitted(make(), value)
    assert handed.extra_args is None


def test_cache_drops_the_least_recently_used():
    admission, compiled = make(), {}
    for k in (1, 2, 3):
        text = json.dumps({"dynamic_k": {"p": k / 4}})
        compiled[text] = compile_request(parse(text, presets={}), admission.context)
    one, two, three = compiled
    cache = PlanCache()
    cache.put(one, compiled[one])
    cache = PlanCache(max_bytes=2 * cache.used_bytes)
    for text in (one, two):
        cache.put(text, compiled[text])
    assert cache.get(one) is compiled[one]
    cache.put(three, compiled[three])
    assert [cache.get(text) is not None for text in compiled] == [True, False, True]


def test_cache_stays_within_its_bound():
    admission, rng = make(), random.Random(1)
    admission.cache = cache = PlanCache(max_bytes=60_000)
    for _ in range(200):
        admitted(admission, random_request(rng, admission.shape) or {})
        assert 0 < cache.used_bytes <= cache.max_bytes
    count, used = len(cache), cache.used_bytes
    admitted(admission, json.dumps(BIAS) + " " * cache.max_bytes)
    assert (len(cache), cache.used_bytes) == (count, used)
    assert count < 20


def test_threads_may_share_the_cache():
    admission, rng = make(), random.Random(2)
    admission.cache = PlanCache(max_bytes=60_000)
    values = [random_request(rng, admission.shape) or {} for _ in range(12)]
    want = [uncached(admission, value, 9, None) for value in values]
    order = [rng.randrange(len(values)) for _ in range(600)]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda index: outcome(admission, values[index]), order))
    assert got == [want[index] for index in order]
    kept = sum(size for _, size in admission.cache._kept.values())
    assert admission.cache.used_bytes == kept <= admission.cache.max_bytes
