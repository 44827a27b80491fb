# SPDX-License-Identifier: Apache-2.0
"""A text that outgrows what the adapter may read says so, once."""

from types import SimpleNamespace

from moe_tta.rounds import RequestRounds, Schedule, Work
from moe_tta.vllm_plugin.round_queue import RoundQueue
from tests.plugin.engine import generate, sampling
from tests.plugin.test_reroute_service import (
    ADAPTER,
    PROMPT,
    REROUTE,
    complete,
    rounds_counted,
)
from tests.plugin.test_reroute_service import llm as llm

LONG = (PROMPT + PROMPT)[: ADAPTER["max_context"] - 6]
WORK = Work("reroute", {"steps": 1}, (1, 2, 1))


def test_the_last_report_says_so(llm):
    before = rounds_counted().get("text too long", 0)
    got = complete(llm, LONG, sampling(30, REROUTE))
    *_, adapted, last = got.moe_tta["rounds"]
    assert (adapted["context"], adapted["outcome"]) == (94, "adapted")
    assert last == {
        "service": "reroute",
        "round": 1,
        "context": 102,
        "start": None,
        "outcome": "text too long",
        "milliseconds": 0.0,
    }
    assert len(got.moe_tta["rounds"]) == 2
    assert rounds_counted()["text too long"] == before + 1


def test_texts_that_end_before_do_not(llm):
    got = complete(llm, LONG, sampling(8, REROUTE))
    assert [r["outcome"] for r in got.moe_tta["rounds"]] == ["adapted"]
    once = {"reroute": {**REROUTE["reroute"], "every": 0}}
    got = complete(llm, LONG, sampling(30, once))
    assert [r["outcome"] for r in got.moe_tta["rounds"]] == ["adapted"]


def test_it_changes_no_token(llm):
    """Replay of the rounds that took place gives the same text."""
    got = complete(llm, LONG, sampling(30, REROUTE))
    first = got.moe_tta["rounds"][0]
    settings = {k: v for k, v in REROUTE["reroute"].items() if k != "every"}
    again = {**settings, "replay": [[first["context"], first["start"]]]}
    [(tokens, _)] = generate(llm, [LONG], [sampling(30, {"reroute": again})])
    assert list(got.token_ids) == tokens


def test_the_queue_tells_once():
    queue = RoundQueue(budget=10**6)
    request = SimpleNamespace(
        request_id="a", all_token_ids=list(range(40)), num_computed_tokens=0
    )
    request.num_tokens = 20
    queue.add(request, RequestRounds(WORK, Schedule(8), 20, 30))
    assert list(queue.ended()) == []
    while queue.orders(idle=True):
        pass
    request.num_tokens = 28
    while queue.orders(idle=True):
        pass
    request.num_tokens = 35
    assert list(queue.ended()) == []
    request.num_tokens = 36
    [(name, report)] = queue.ended()
    assert (name, report["round"], report["context"]) == ("a", 2, 36)
    assert list(queue.ended()) == []
    assert queue.orders(idle=True) == []
