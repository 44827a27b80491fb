# SPDX-License-Identifier: Apache-2.0
"""Rounds without an engine: schedules, edits of plans, versions of rows, the queue."""

from dataclasses import replace
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from moe_tta.compile import compile_request
from moe_tta.errors import RequestError
from moe_tta.plan import RoutingPlan
from moe_tta.plan_edit import PlanEdit
from moe_tta.rounds import RequestRounds, Round, Schedule, Work
from moe_tta.settings import AdapterSettings
from moe_tta.shape import RouterShape
from moe_tta.spec import parse
from moe_tta.strategies import PlanContext
from moe_tta.vllm_plugin.round_orders import Advance, Begin, End, Reader, Revise
from moe_tta.vllm_plugin.round_queue import RoundQueue
from moe_tta.vllm_plugin.rows import PlannedRequest
from moe_tta.vllm_plugin.versions import Version, VersionedRequest, unplanned

SHAPE = RouterShape(
    layers=(1, 2, 3), num_hidden_layers=4, num_experts=8, top_k=2, k_max=4
)
WORK = Work("reroute", {"steps": 1}, (1, 2, 1))


def compiled(value, adapter=None):
    context = PlanContext(SHAPE, adapter=adapter)
    return compile_request(parse(value, presets={}), context)


def test_schedules():
    wait = Schedule(8)
    assert [wait.round(n, 20) for n in (0, 1)] == [Round(20, 19), Round(28, 27)]
    assert Schedule(0).round(0, 20) == Round(20, 19)
    assert Schedule(0).round(1, 20) is None
    assert Schedule(8, "overlap").round(1, 20) == Round(28, None)
    replay = Schedule(0, replay=((9, 8), (12, 30)))
    assert [replay.round(n, 20) for n in range(3)] == [Round(9, 8), Round(12, 30), None]


def test_no_round_reads_more_than_it_may():
    rounds = RequestRounds(WORK, Schedule(8), 20, 30)
    assert [rounds.round(n) for n in range(3)] == [Round(20, 19), Round(28, 27), None]
    assert [rounds.missed(n) for n in range(3)] == [None, None, Round(36, 35)]
    assert RequestRounds(WORK, Schedule(0), 20, 30).missed(1) is None


def test_the_first_row_that_may_have_a_version():
    assert RequestRounds(WORK, Schedule(8), 20, 99).first_row == 19
    assert RequestRounds(WORK, Schedule(8, "overlap"), 20, 99).first_row == 19
    replay = Schedule(0, replay=((9, 8), (12, 30)))
    assert RequestRounds(WORK, replay, 20, 99).first_row == 8


@pytest.mark.parametrize("replay", [None, ((9, 8), (12, 30))])
def test_rounds_survive_the_wire(replay):
    rounds = RequestRounds(WORK, Schedule(8, "wait", replay), 20, 99)
    wire = msgspec.msgpack.decode(msgspec.msgpack.encode(rounds.to_wire()))
    assert RequestRounds.from_wire(wire) == rounds


def test_what_a_request_asks_for():
    asked = compiled({"reroute": {"every": 16, "steps": 2, "layers": [1, 3]}}).rounds
    assert asked.schedule == Schedule(16)
    assert asked.work.passes == (2, 2, 1)
    assert asked.work.arguments["layers"] == (1, 3)
    assert asked.work.cost(1, 50) == 100
    assert asked.work.together
    assert not asked.work.probes
    quiet = AdapterSettings(last_loss=False)
    untold = compiled({"reroute": {"steps": 2}}, adapter=quiet).rounds
    assert untold.work.passes == (2, 2)
    assert untold.work.arguments["last_loss"] is False
    drawn = compiled({"reroute": {"optimizer": "spsa", "steps": 2}}).rounds
    assert drawn.work.probes
    assert not drawn.work.together
    assert drawn.work.passes == (8, 8, 1)  # four pairs a step, then the last loss
    assert drawn.work.arguments["layers"] == (1, 2, 3)
    named = compiled({"reroute": {"optimizer": "spsa", "layers": [2]}}).rounds
    assert named.work.arguments["layers"] == (2,)
    assert compiled({"dynamic_k": {"k": 1}}).rounds is None
    with pytest.raises(RequestError, match=r"layers\[0\].*1-3.*got 0"):
        compiled({"reroute": {"layers": [0]}})


def test_without_gradients_spsa_alone_is_served():
    context = PlanContext(SHAPE, adapter=AdapterSettings(gradients=False))
    for asked in ({}, {"optimizer": "sgd"}):
        with pytest.raises(RequestError, match="expected 'spsa'") as error:
            compile_request(parse({"reroute": asked}, presets={}), context)
        assert error.value.parameter == "moe_tta.reroute.optimizer"
    spec = parse({"reroute": {"optimizer": "spsa"}}, presets={})
    assert compile_request(spec, context).rounds.work.probes


def ones(value=1.0):
    return np.full((3, 8), value, np.float32)


def test_edits_add_to_the_bias_and_replace_the_rest():
    own = RoutingPlan(bias=ones(2), scale=ones(3)).normalised()
    edited = PlanEdit({"bias": ones(0.5)}).applied(own, 0)
    assert (edited.bias == 2.5).all()
    assert (edited.scale == 3).all()
    assert (PlanEdit({"scale": ones(4)}).applied(own, 0).scale == 4).all()
    assert (PlanEdit({"bias": ones()}).applied(None, 2).bias == 1).all()
    # what cancels out is the model's own rule
    assert PlanEdit({"bias": ones(-2)}).applied(RoutingPlan(bias=ones(2)), 1) is None
    assert PlanEdit({"bias": ones(0)}).applied(None, 1) is None


def test_edits_of_one_segment():
    edit = PlanEdit({"bias": ones()}, (False, True, False))
    assert edit.applied(None, 0) is None
    assert edit.applied(None, 1) is not None


def rows_of(request, start, count):
    found = {}
    for first, end, name in request.runs(start, count):
        found |= dict.fromkeys(range(start + first, start + end), name)
    return found


def test_rows_obey_the_version_of_their_position():
    own = RoutingPlan(scale=ones(3)).normalised()
    request = VersionedRequest(
        PlannedRequest(
            10, (None, own.fingerprint, None), {own.fingerprint: own.to_bytes()}
        )
    )
    edits = [PlanEdit({"bias": ones(value)}) for value in (1, 2, 3)]
    request.add(Version(9, edits[0]))
    request.add(Version(14, edits[1]))
    request.add(Version(14, edits[2]))  # overlapped: the later one stands
    last = edits[0].applied(own, 1).fingerprint
    first, _, third = (edit.applied(None, 2).fingerprint for edit in edits)
    wanted = {9: last} | dict.fromkeys(range(10, 14), first)
    wanted |= dict.fromkeys(range(14, 20), third)
    assert rows_of(request, 0, 20) == wanted
    assert request.edit is edits[2]
    for start in range(20):  # however a chunk is cut
        part = {p: name for p, name in wanted.items() if start <= p < start + 6}
        assert rows_of(request, start, 6) == {
            p: name for p, name in part.items() if p < start + 6
        } | dict.fromkeys(range(20, start + 6), third)
    assert set(wanted.values()) <= request.plans.keys()


def test_versions_of_a_request_that_comes_later():
    edit = PlanEdit({"bias": ones()})
    early = VersionedRequest(unplanned(5), [Version(4, edit)])
    own = RoutingPlan(bias=ones(2)).normalised()
    marks = (own.fingerprint,) * 3
    late = early.with_own(PlannedRequest(5, marks, {own.fingerprint: own.to_bytes()}))
    both = edit.applied(own, 0).fingerprint
    assert rows_of(late, 0, 7) == dict.fromkeys(range(4), own.fingerprint) | (
        dict.fromkeys(range(4, 7), both)
    )


def asking(name, tokens, schedule, prompt_len, work=WORK):
    request = SimpleNamespace(
        request_id=name, all_token_ids=list(range(tokens)), num_computed_tokens=0
    )
    request.num_tokens = tokens
    return request, RequestRounds(work, schedule, prompt_len, 1000)


def test_the_queue_spends_its_budget_in_turn():
    queue = RoundQueue(budget=15)
    for name in ("a", "b"):
        queue.add(*asking(name, 10, Schedule(0), 10))
    begin, advance = queue.orders(idle=False)  # 10 of 15
    reader = Reader("a", 0, list(range(10)), 10)
    assert begin == Begin("reroute", {"steps": 1}, (reader,))
    assert advance == Advance()
    assert queue.orders(idle=False) == [Advance()]  # 20 of 5 + 15
    assert queue.orders(idle=False) == [Advance(), End("a", 9)]  # 10 of 15
    assert [type(o) for o in queue.orders(idle=False)] == [Begin, Advance]  # 5 + 15
    # nobody else works: the dear unit is not put off
    assert queue.orders(idle=True) == [Advance()]
    assert queue.orders(idle=True) == [Advance(), End("b", 9)]
    assert queue.orders(idle=True) == []


def test_probes_have_their_turn_in_the_same_queue():
    queue = RoundQueue(budget=15)
    probed = Work("reroute", {"steps": 1}, (2, 1), probes=True)
    queue.add(*asking("a", 10, Schedule(0), 10))
    queue.add(*asking("b", 10, Schedule(0, "overlap"), 10, probed))
    queue.add(*asking("c", 10, Schedule(0), 10))
    assert queue.probing() is None
    while not any(isinstance(order, End) for order in queue.orders(idle=True)):
        pass
    [reader] = queue.probing().readers
    assert (reader.request_id, reader.tokens) == ("b", list(range(10)))
    assert not queue.pay(idle=False)  # 20 of what is left of 15
    assert queue.orders(idle=True) == []  # c waits for its turn
    assert queue.pay(idle=False)
    assert queue.pay(idle=True)
    edit = PlanEdit({"bias": ones()})
    assert queue.finish(edit) == 9
    assert queue.probing() is None
    revise, begin, *_ = queue.orders(idle=True)
    assert revise == Revise("b", 10, 9, edit)
    assert begin.readers[0].request_id == "c"


def readers_of(orders):
    return [
        [reader.request_id for reader in order.readers]
        for order in orders
        if isinstance(order, Begin)
    ]


BATCHED = replace(WORK, together=True)


def test_the_queue_batches_equal_work():
    queue = RoundQueue(budget=10**6, batch_tokens=70)
    other = replace(BATCHED, arguments={"steps": 2})
    for name, tokens, work in (
        *(("a", 10, BATCHED), ("b", 20, other), ("c", 30, BATCHED)),
        *(("d", 11, BATCHED), ("e", 20, other), ("f", 12, WORK), ("g", 12, WORK)),
    ):
        queue.add(*asking(name, tokens, Schedule(0), tokens, work))
    # 2 x 30 of 70, with d it would be 90; f and g cannot be batched
    orders = queue.orders(idle=False)
    assert readers_of(orders) == [["a", "c"], ["b", "e"], ["d"], ["f"], ["g"]]
    ends = [order for order in orders if isinstance(order, End)]
    assert ends[:4] == [End("a", 9), End("c", 29), End("b", 19), End("e", 19)]
    assert queue.orders(idle=True) == []


def test_a_batch_costs_its_texts_and_outlives_its_members():
    queue = RoundQueue(budget=40, batch_tokens=90)
    for name, tokens in (("a", 10), ("b", 20), ("c", 15), ("d", 12)):
        queue.add(*asking(name, tokens, Schedule(0), tokens, BATCHED))
    assert queue.orders(idle=False) == []  # 57 of 40
    assert readers_of(queue.orders(idle=False)) == [["a", "b", "c", "d"]]
    queue.remove("a")
    queue.remove("b")
    assert queue.orders(idle=False) == [Advance()]  # 2 x 27 of 23 + 40
    queue.remove("d")
    assert queue.orders(idle=False) == [Advance(), End("c", 14)]
    assert queue.orders(idle=True) == []
    for name in ("x", "y"):
        queue.add(*asking(name, 10, Schedule(0), 10, BATCHED))
    assert readers_of(queue.orders(idle=True)) == [["x", "y"]]
    queue.remove("x")
    queue.remove("y")
    queue.add(*asking("z", 10, Schedule(0), 10, BATCHED))
    assert readers_of(queue.orders(idle=True)) == [["z"]]


def test_the_queue_forgets_who_leaves():
    queue = RoundQueue(budget=10)
    for name in ("a", "b"):
        queue.add(*asking(name, 10, Schedule(0), 10))
    queue.orders(idle=False)
    queue.remove("a")
    assert readers_of(queue.orders(idle=False)) == [["b"]]
    queue.remove("b")
    queue.remove("nobody")
    assert len(queue) == 0
    assert queue.orders(idle=True) == []


def test_the_queue_limits_rows():
    queue = RoundQueue(budget=10**6)
    request, rounds = asking("a", 30, Schedule(4), 20)
    queue.add(request, rounds)
    assert queue.holds_back(request)
    assert queue.limit("a", 0, 30) == 19
    assert queue.limit("a", 19, 1) == 0
    assert queue.limit("other", 19, 1) == 1
    for _ in range(3):  # contexts 20, 24 and 28: row 31 waits for tokens
        queue.orders(idle=True)
    assert not queue.holds_back(request)
    assert queue.limit("a", 0, 30) == 23  # rows of the first two plans
    assert queue.limit("a", 23, 7) == 7
    assert queue.limit("a", 30, 5) == 1


def test_overlapping_versions_start_where_no_row_was_handed_out():
    queue = RoundQueue(budget=10**6)
    request, rounds = asking("a", 20, Schedule(0, "overlap"), 20)
    queue.add(request, rounds)
    assert not queue.holds_back(request)
    assert queue.limit("a", 0, 20) == 20
    request.num_computed_tokens = 23
    queue.note_handed()
    request.num_computed_tokens = 0  # preempted
    queue.note_handed()
    assert queue.orders(idle=True)[-1] == End("a", 23)
