# SPDX-License-Identifier: Apache-2.0
"""Twenty thousand payloads over HTTP: each is accepted or a 400, and nothing stays."""

import asyncio
import collections
import json
import random

import httpx
from transformers import AutoConfig

from moe_tta.vllm_plugin.model_shape import shape_from_config
from tests.requests import random_request

NUM_PAYLOADS = 20_000
SEED = 20261122
CONCURRENCY = 32

ODD = [
    None,
    True,
    -1,
    0,
    1,
    64,
    2**53,
    -(2**63),
    1e300,
    0.5,
    "",
    "k",
    "é\u0000",
    [],
    {},
]
ODD += [[[0, 1]], [[0, 1, 2, 3]], {"0": [0]}, "NaN", [[0, 0], [0, 0]], {"k": {"k": 1}}]


def payload(rng, shape):
    """Return the text of one `moe_tta` parameter, valid about one time in three."""
    kind = rng.random()
    if kind < 0.1:
        return rng.choice(ODD)
    if kind < 0.2:
        return "".join(chr(rng.randrange(32, 0x2FF)) for _ in range(rng.randrange(40)))
    value = random_request(rng, shape) or {}
    # this server refuses inline edits before it looks at them closely
    if rng.random() < 0.5 and "steer" in value:
        value["steer"] = {"mask": rng.choice(["quiet", "quite"])}
    if rng.random() < 0.2:
        value = {"contrast": {"weak": value, "beta": rng.choice([0, 0.5, 3])}}
    if kind < 0.7:
        for _ in range(rng.randrange(1, 3)):
            value = mutate(rng, value)
    text = json.dumps(value)
    if kind > 0.95:
        text = text[: rng.randrange(len(text) + 1)]
    return text


def mutate(rng, value):
    """Replace, drop or rename one node of a JSON tree."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        action = rng.random()
        if action < 0.7:
            return {**value, key: mutate(rng, value[key])}
        rest = {k: v for k, v in value.items() if k != key}
        return rest if action < 0.85 else {**rest, key + "x": value[key]}
    if isinstance(value, list) and value and rng.random() < 0.85:
        index = rng.randrange(len(value))
        return [*value[:index], mutate(rng, value[index]), *value[index + 1 :]]
    return rng.choice(ODD)


async def send_all(url, payloads):
    """Return (status, body, payload) of every request."""
    answers, queue = [], iter(payloads)
    limits = httpx.Limits(max_connections=CONCURRENCY)
    async with httpx.AsyncClient(timeout=120, limits=limits) as http:

        async def worker():
            for value in queue:
                body = {
                    "model": "lab",
                    "prompt": [5, 6, 7],
                    "max_tokens": 1,
                    "vllm_xargs": {"moe_tta": value},
                }
                answer = await http.post(
                    f"{url}/completions",
                    content=json.dumps(body),
                    headers={"content-type": "application/json"},
                )
                answers.append((answer.status_code, answer.text, value))

        await asyncio.gather(*(worker() for _ in range(CONCURRENCY)))
    return answers


def test_every_payload_is_accepted_or_400(server, lab):
    url = server[0]
    shape = shape_from_config(AutoConfig.from_pretrained(lab("olmoe-fine")), 12)
    rng = random.Random(SEED)
    payloads = [payload(rng, shape) for _ in range(NUM_PAYLOADS)]
    answers = asyncio.run(send_all(url, payloads))
    count = collections.Counter(status for status, _, _ in answers)
    odd = [answer for answer in answers if answer[0] not in (200, 400)]
    assert odd == []
    assert sum(count.values()) == NUM_PAYLOADS
    assert min(count[200], count[400]) > NUM_PAYLOADS / 20
    for status, text, value in answers:
        if status == 400:
            error = json.loads(text)["error"]
            assert "moe_tta" in (error["param"] or error["message"]), (text, value)
    assert set(left_behind(url).values()) == {0}


def left_behind(url):
    """Ask the worker, after one more step, what it still holds."""
    plain = {"model": "lab", "prompt": [5, 6, 7], "max_tokens": 2}
    root = url.removesuffix("/v1")
    with httpx.Client(timeout=60) as http:
        assert http.post(f"{url}/completions", json=plain).status_code == 200
        rpc = {"method": "moe_tta_status"}
        (status,) = http.post(f"{root}/collective_rpc", json=rpc).json()["results"]
    return {
        name: status[name] for name in ("requests_with_plan", "slots_in_use", "pairs")
    }
