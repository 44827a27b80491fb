# SPDX-License-Identifier: Apache-2.0
"""The demo's client: every request at once, as separate users would send them."""

import asyncio
import time
from dataclasses import dataclass

from openai import AsyncOpenAI, BadRequestError, DefaultAsyncHttpxClient

from benchmarks.demo.cases import Case

MODEL = "demo"


@dataclass(frozen=True)
class Answer:
    """What came back: a text, or an HTTP 400.

    Attributes:
        id: Of the response; the trace's file name starts with it.
        text: The answer, or the refusal's message.
        ms_per_token: Time of the whole request over its tokens.
        status: HTTP status.
        param: The parameter a refusal names.
    """

    text: str
    id: str = ""
    ms_per_token: float = 0.0
    status: int = 200
    param: str | None = None


async def ask_all(
    url: str, cases: list[Case], prompt: str, tokens: int
) -> list[Answer]:
    """Send all requests in one batch, then one more so that all traces are written."""
    web = DefaultAsyncHttpxClient(trust_env=False)  # loopback needs no proxy
    async with AsyncOpenAI(
        base_url=f"{url}/v1", api_key="none", http_client=web
    ) as client:
        answers = await asyncio.gather(
            *(ask(client, case, prompt, tokens) for case in cases)
        )
        await client.completions.create(model=MODEL, prompt="The end", max_tokens=1)
        return answers


async def ask(client: AsyncOpenAI, case: Case, prompt: str, tokens: int) -> Answer:
    routing = case.request.extra_body if case.request else {}
    start = time.perf_counter()
    try:
        done = await client.completions.create(
            model=MODEL,
            prompt=prompt,
            max_tokens=tokens,
            temperature=0,
            extra_body={"ignore_eos": True, **routing},
        )
    except BadRequestError as err:
        return Answer(err.body["message"], status=400, param=err.body["param"])
    seconds = time.perf_counter() - start
    return Answer(done.choices[0].text, done.id, 1e3 * seconds / tokens)
