# SPDX-License-Identifier: Apache-2.0
"""Rerouting through `vllm serve`, the OpenAI client and the endpoint of rounds."""

import json
import urllib.error
import urllib.request

import openai
import pytest

import moe_tta
from tests.e2e.test_contrast import complete, held, metric

REROUTE = moe_tta.request(reroute={"every": 8, "steps": 1, "lr": 0.5}).extra_body


def rounds(server, response_id):
    url = f"{server[0]}/moe_tta/requests/{response_id}"
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)["completions"]


def test_rounds_are_run_reported_and_counted(server, client):
    plain, adapted = complete(client, {}), complete(client, REROUTE)
    assert adapted.choices[0].text != plain.choices[0].text
    assert adapted.model_extra["kv_transfer_params"] is None  # they travelled there
    [completion] = rounds(server, adapted.id)
    length = adapted.usage.prompt_tokens
    contexts = [report["context"] for report in completion["rounds"]]
    assert contexts == [length, length + 8, length + 16]
    for report in completion["rounds"]:
        assert report["outcome"] == "adapted"
        assert len(report["losses"]) == 2
    assert metric(server, "moe_tta:rounds_total") >= 3
    again = complete(client, REROUTE)
    assert again.choices[0].text == adapted.choices[0].text
    assert complete(client, {}).choices[0].text == plain.choices[0].text
    assert held(server)["jobs"] == 0


def test_spsa_goes_through_the_engine(server, client):
    spsa = {"every": 8, "steps": 1, "lr": 10, "optimizer": "spsa"}
    body = moe_tta.request(reroute=spsa).extra_body
    adapted = complete(client, body)
    [completion] = rounds(server, adapted.id)
    assert [report["outcome"] for report in completion["rounds"]] == ["adapted"] * 3
    assert all(len(report["losses"]) == 2 for report in completion["rounds"])
    assert complete(client, body).choices[0].text == adapted.choices[0].text


def test_streams_and_completions(server, client):
    text = complete(client, REROUTE, max_tokens=10).choices[0].text
    stream = list(complete(client, REROUTE, max_tokens=10, stream=True))
    assert "".join(chunk.choices[0].text for chunk in stream) == text
    assert len(rounds(server, stream[0].id)[0]["rounds"]) == 2
    chat = client.chat.completions.create(
        model="lab",
        messages=[{"role": "user", "content": "The fox"}],
        max_tokens=4,
        n=2,
        extra_body=REROUTE,
    )
    assert [entry["index"] for entry in rounds(server, chat.id)] == [0, 1]


def test_refused(server, client):
    with pytest.raises(openai.BadRequestError, match="at most 200 tokens"):
        complete(client, REROUTE, prompt=list(range(5, 210)))
    body = {"vllm_xargs": {"moe_tta": '{"reroute": {"every": 3}}'}}
    with pytest.raises(openai.BadRequestError) as error:
        complete(client, body)
    assert error.value.param == "moe_tta.reroute.every"
    with pytest.raises(urllib.error.HTTPError, match="404"):
        rounds(server, complete(client, {}, max_tokens=1).id)
