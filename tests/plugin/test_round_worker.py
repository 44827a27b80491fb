# SPDX-License-Identifier: Apache-2.0
"""Jobs of several requests in the worker: whose result is whose, what is dropped."""

import numpy as np

from moe_tta.plan_edit import PlanEdit
from moe_tta.vllm_plugin.round_orders import Advance, Begin, End, Reader, Revise
from moe_tta.vllm_plugin.round_worker import RoundWorker
from moe_tta.vllm_plugin.services import Result


class Pretended:
    """A service whose result for a text is its first token; fails where told."""

    def __init__(self, fails=False):
        self.fails, self.begun = fails, []

    def begin(self, texts, arguments):
        self.begun.append([(text.tokens[0], text.edit) for text in texts])
        return self

    def advance(self):
        if self.fails:
            raise RuntimeError("told to")

    def results(self):
        texts = self.begun[-1]
        return [Result("adapted", edit_of(first), {}) for first, _ in texts]


def edit_of(value):
    return PlanEdit({"bias": np.full((1, 2), value, np.float32)})


def begin(*names):
    readers = (
        Reader(name, 0, [ord(name), 0, 0], prompt_len=3) for name in sorted(names)
    )
    return Begin("pretended", {}, tuple(readers))


def outcomes(worker):
    return {name: report["outcome"] for name, report in worker.take_reports()}


def test_each_gets_its_own_and_the_finished_none():
    service, requests = Pretended(), {}
    worker = RoundWorker({"pretended": service}, requests)
    worker.obey([begin("a", "b", "c"), Advance()], [])
    assert worker.jobs == ("a", "b", "c")
    worker.obey([Advance(), End("a", 2), End("c", 5)], ["b"])
    assert worker.jobs == ()
    assert outcomes(worker) == {"a": "adapted", "c": "adapted"}
    assert requests.keys() == {"a", "c"}
    for name in requests:
        assert (requests[name].edit.fields["bias"] == ord(name)).all()
    # the next round goes on from the edits in force
    worker.obey([begin("c", "d"), Advance()], [])
    assert service.begun[-1] == [(ord("c"), requests["c"].edit), (ord("d"), None)]
    worker.obey([], ["c", "d"])
    assert worker._running is None
    worker.obey([begin("a"), Advance(), End("a", 9)], [])
    assert outcomes(worker) == {"a": "adapted"}


def test_a_job_that_fails_is_told_to_all():
    worker = RoundWorker({"pretended": Pretended(fails=True)}, requests := {})
    worker.obey([begin("a", "b"), Advance(), Advance()], [])
    worker.obey([End("a", 2), End("b", 2)], [])
    assert outcomes(worker) == {"a": "failed", "b": "failed"}
    assert requests == {}
    assert worker.jobs == ()


def test_what_probes_found_is_taken_over():
    """Also for a request that was never scheduled; the next job goes on from it."""
    service, requests = Pretended(), {}
    worker = RoundWorker({"pretended": service}, requests)
    worker.obey([Revise("a", 3, 2, edit_of(5)), Revise("a", 3, 9, edit_of(7))], [])
    names = [name for _, _, name in requests["a"].runs(0, 12)]
    assert [first for first, _, _ in requests["a"].runs(0, 12)] == [2, 3, 9]
    assert names[0] == names[1] != names[2]
    assert worker.take_reports() == []
    worker.obey([begin("a")], [])
    assert service.begun == [[(ord("a"), requests["a"].edit)]]


def test_a_batch_shares_its_time():
    worker = RoundWorker({"pretended": Pretended()}, {})
    worker.obey([begin("a", "b"), Advance(), End("a", 2), End("b", 2)], [])
    first, second = (report for _, report in worker.take_reports())
    assert first["milliseconds"] == second["milliseconds"]
    assert first["context"] == 3
