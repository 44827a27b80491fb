# SPDX-License-Identifier: Apache-2.0
"""The endpoint of rounds, and what it keeps."""

from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

from moe_tta.vllm_plugin import endpoint
from moe_tta.vllm_plugin.round_records import RoundRecords


def test_a_response_and_its_completions(monkeypatch):
    records = RoundRecords()
    records.keep("cmpl-a-1", 0, [{"round": 0}])
    records.keep("cmpl-a-0", 1, [{"round": 0}])
    records.keep("cmpl-a-0", 0, [{"round": 0}])
    records.keep("cmpl-a-0", 0, [{"round": 0}, {"round": 1}])
    records.keep("cmpl-ab-0", 0, [{"round": 9}])
    monkeypatch.setattr(endpoint, "of_process", lambda: records)
    plugin, app = endpoint.RoundsEndpoint(), FastAPI()
    assert isinstance(plugin, EndpointPlugin)
    plugin.attach_router(app)
    client = TestClient(app)
    answer = client.get("/v1/moe_tta/requests/cmpl-a")
    assert answer.status_code == 200
    assert answer.json() == {
        "id": "cmpl-a",
        "completions": [
            {"prompt": 0, "index": 0, "rounds": [{"round": 0}, {"round": 1}]},
            {"prompt": 0, "index": 1, "rounds": [{"round": 0}]},
            {"prompt": 1, "index": 0, "rounds": [{"round": 0}]},
        ],
    }
    for unknown in ("cmpl-", "cmpl-.", "cmpl-b"):
        answer = client.get(f"/v1/moe_tta/requests/{unknown}")
        assert answer.status_code == 404
        assert "no rounds" in answer.json()["error"]["message"]


def test_the_oldest_leave_first():
    records = RoundRecords(max_requests=2)
    for name in ("a", "b"):
        records.keep(name, 0, [{}])
    records.keep("a", 0, [{}, {}])
    records.keep("c", 0, [{}])
    assert [bool(records.find(name)) for name in "abc"] == [True, False, True]
