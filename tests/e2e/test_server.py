# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` and the OpenAI client: steered, refused, and never silently neither."""

import openai
import pytest

import moe_tta

PROMPT = "The river runs through the old town and"
NEAR = [1.0] + [0.0] * 7  # the first reference of the store "solved"


def complete(client, request=None, **options):
    """Return the completion's tokens with their logprobs."""
    body = {} if request is None else moe_tta.request(**request).extra_body
    answer = client.completions.create(
        model="lab",
        prompt=PROMPT,
        max_tokens=8,
        temperature=0,
        logprobs=0,
        extra_body={"ignore_eos": True, **body},
        **options,
    )
    first = answer.choices[0].logprobs
    return list(zip(first.tokens, first.token_logprobs, strict=True))


def test_startup_line(server, client):
    complete(client)
    assert "moe-tta armed 8/8 layers" in server[1].read_text()


@pytest.mark.parametrize(
    "request_",
    [
        {"dynamic_k": {"k": 1}},
        {"dynamic_k": {"k": 12}},
        {"dynamic_k": {"p": 0.3}, "renorm": "always"},
        {"steer": {"mask": "quiet"}},
        {"preset": "frugal"},
        {"preset": "loud"},
        {"remix": {"store": "solved", "vector": NEAR}},
    ],
    ids=str,
)
def test_plans_change_the_answer(client, request_):
    plain, planned = complete(client), complete(client, request_)
    assert planned != plain
    assert complete(client, request_) == planned
    assert complete(client) == plain


def test_neutral_requests_do_not(client):
    plain = complete(client)
    assert complete(client, {"dynamic_k": {"k": 8}}) == plain
    assert complete(client, {}) == plain
    far = {"store": "solved", "vector": [-x for x in NEAR], "floor": 0.1}
    assert complete(client, {"remix": far}) == plain


def test_chat_streaming_and_two_choices(client):
    options = {
        "model": "lab",
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": 6,
        "extra_body": {"top_k": 1, **moe_tta.request(preset="frugal").extra_body},
    }
    answer = client.chat.completions.create(n=2, **options)
    texts = [choice.message.content for choice in answer.choices]
    assert texts[0] == texts[1]
    stream = client.chat.completions.create(stream=True, **options)
    streamed = "".join(
        chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices
    )
    assert streamed == texts[0]


REFUSED = [
    ('{"steer": {"promote": [[0, 64]]}}', "steer.promote", "inline"),
    ('{"steer": {"mask": "quite"}}', "steer.mask", "quiet"),
    ('{"dynamic_k": {"k": 13}}', "dynamic_k.k", "1..12"),
    ('{"dynamic_k": {"p": NaN}}', "dynamic_k.p", "finite"),
    ('{"dynamic_k": {"k": true}}', "dynamic_k.k", "integer"),
    ('{"dynamick": {"k": 1}}', "dynamick", "did you mean 'dynamic_k'"),
    ('{"remix": {"store": "solvd"}}', "remix.store", "did you mean 'solved'"),
    ('{"remix": {"store": "gone"}}', "remix.store", "No such file"),
    ('{"remix": {"store": "solved", "k": 3}}', "remix.k", "1..2"),
    ('{"remix": {"store": "solved"}}', "remix.vector", "hidden states"),
    ('{"remix": {"distribution": {"0": [1]}}}', "remix.distribution", "inline"),
    ('{"dynamic_k": {"k": 1}, "prompt_tokens": 99}', "prompt_tokens", "1.."),
    ("frugle", "", "did you mean 'frugal'"),
    ('{"renorm": "sometimes"}', "renorm", "always"),
    ("{", "", "JSON"),
]


@pytest.mark.parametrize(("value", "path", "hint"), REFUSED, ids=lambda case: case)
def test_bad_requests_are_400(client, value, path, hint):
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(
            model="lab",
            prompt=PROMPT,
            max_tokens=2,
            extra_body={"vllm_xargs": {"moe_tta": value}},
        )
    want = ".".join(["moe_tta", path]) if path else "moe_tta"
    assert error.value.param.startswith(want)
    assert hint in error.value.message
    assert complete(client)


def test_bad_streams_are_400_too(client):
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(
            model="lab",
            prompt=PROMPT,
            stream=True,
            extra_body={"vllm_xargs": {"moe_tta": "frugle"}},
        )
    assert error.value.param == "moe_tta"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"moe_tta": {"dynamic_k": {"k": 1}}}, "moe_tta"),
        ({"vllm_xargs": {"moe_tta_k": 1}}, "moe_tta_k"),
        ({"vllm_xargs": {"moe-tta": "frugal"}}, "moe-tta"),
        ({"cache_salt": "moe-tta:00"}, "cache_salt"),
    ],
)
def test_misplaced_members_are_400(client, body, param):
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(
            model="lab", prompt=PROMPT, max_tokens=2, extra_body=body
        )
    assert error.value.param == param
