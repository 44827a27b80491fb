# SPDX-License-Identifier: Apache-2.0
"""Self-contrast through `vllm serve` and the OpenAI client."""

import json
import re
import urllib.request

import openai
import pytest

import moe_tta

PROMPT = "The river runs through the old town and"
CONTRAST = moe_tta.request(contrast={"weak": {"rank": 2}, "beta": 1.0}).extra_body
ASK = {"model": "lab", "prompt": PROMPT, "max_tokens": 24, "temperature": 0}


def complete(client, extra=CONTRAST, **options):
    return client.completions.create(**{**ASK, **options}, extra_body=extra)


def held(server):
    """Return the worker's counts, after the step in which it hears of the last."""
    body = json.dumps({"method": "moe_tta_status"}).encode()
    request = urllib.request.Request(
        server[0].removesuffix("/v1") + "/collective_rpc",
        body,
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)["results"][0]


def metric(server, name):
    url = server[0].removesuffix("/v1") + "/metrics"
    with urllib.request.urlopen(url, timeout=30) as answer:
        text = answer.read().decode()
    values = re.findall(rf"^{name}{{.*}} (.*)$", text, re.MULTILINE)
    assert values, name
    return sum(float(value) for value in values)


def test_contrast_changes_the_answer_and_usage_does_not(client):
    plain, contrasted = complete(client, {}), complete(client)
    assert contrasted.choices[0].text != plain.choices[0].text
    assert complete(client).choices[0].text == contrasted.choices[0].text
    assert contrasted.usage.prompt_tokens == plain.usage.prompt_tokens
    assert contrasted.usage.completion_tokens <= 24


def test_streams_and_chat(client):
    text = complete(client).choices[0].text
    stream = complete(client, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == text
    chat = client.chat.completions.create(
        model="lab",
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=6,
        n=2,
        extra_body={"top_k": 1, **CONTRAST},
    )
    assert chat.choices[0].message.content == chat.choices[1].message.content
    assert chat.usage.completion_tokens <= 12


def test_logprobs_are_those_of_the_combination(client):
    """At alpha 1 the best token alone is plausible: its probability is 1."""
    only_best = moe_tta.request(contrast={"weak": {"rank": 2}, "alpha": 1.0})
    answer = complete(client, only_best.extra_body, logprobs=1)
    assert answer.choices[0].logprobs.token_logprobs == [0.0] * len(
        answer.choices[0].logprobs.token_logprobs
    )


def test_stop_strings_end_both_streams(server, client):
    text = complete(client).choices[0].text
    word = text.split()[4]
    stopped = complete(client, stop=[word]).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == text[: text.index(word)]
    complete(client, {})
    assert held(server)["pairs"] == 0
    assert metric(server, "vllm:num_requests_running") == 0
    assert metric(server, "moe_tta:pairs_running") == 0
    assert metric(server, "moe_tta:pairs_admitted_total") > 1


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        ({"choice": ["northern", "southern"]}, "(northern|southern)"),
        ({"regex": "[0-9]{3}-[0-9]{2}"}, "[0-9]{3}-[0-9]{2}"),
    ],
    ids=["choice", "regex"],
)
@pytest.mark.parametrize("temperature", [0, 1])
def test_grammars_hold(server, client, grammar, pattern, temperature):
    """Tokens the grammar allows are compared among themselves."""
    extra = {**CONTRAST, "structured_outputs": grammar, "seed": 3}
    answer = complete(client, extra, temperature=temperature).choices[0]
    assert re.fullmatch(pattern, answer.text)
    assert answer.finish_reason == "stop"


REFUSED = [
    ({"contrast": {"weak": {"rank": 65}}}, {}, "contrast.weak.rank", "1..64"),
    ({"contrast": {"beta": 0.5}}, {}, "contrast.weak", "missing"),
    ({"contrast": {"weak": {}, "beta": 99}}, {}, "contrast.beta", "equal to 10"),
    ({"contrast": {"weak": {}, "alpha": "1"}}, {}, "contrast.alpha", "number"),
    (
        {"contrast": {"weak": {"steer": {"promote": [[1, 1]]}}}},
        {},
        "contrast.weak.steer.promote",
        "inline",
    ),
    ({"contrast": {"weak": {"k": 1}}}, {"prompt_logprobs": 1}, "", "prompt_logprobs"),
    ({"contrast": {"weak": {"k": 1}}}, {"use_beam_search": True}, "", "beam search"),
    ({"dynamic_k": {"k": 1}}, {"use_beam_search": True}, "", "beam search"),
]


@pytest.mark.parametrize(
    ("value", "options", "path", "hint"), REFUSED, ids=lambda case: str(case)[:40]
)
def test_bad_requests_are_400(client, value, options, path, hint):
    extra = {"vllm_xargs": {"moe_tta": json.dumps(value)}, **options}
    with pytest.raises(openai.BadRequestError) as error:
        complete(client, extra)
    assert error.value.param == ".".join(filter(None, ["moe_tta", path]))
    assert hint in error.value.message
    assert complete(client).choices[0].text
