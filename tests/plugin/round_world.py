# SPDX-License-Identifier: Apache-2.0
"""The pretend worker of `pair_world`, which also obeys orders and knows versions."""

from collections import defaultdict

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors

from moe_tta.plan_edit import PlanEdit
from moe_tta.vllm_plugin.probes import PROBE
from moe_tta.vllm_plugin.round_orders import (
    ORDERS,
    ROUNDS,
    Advance,
    Begin,
    End,
    Revise,
)
from moe_tta.vllm_plugin.services import Result
from tests.plugin.pair_world import Worker, WorkerV2, World, digest

MAX_VERSIONS = 2  # of one chunk, which bounds the plans of a step


class Rounds:
    """Checks orders, and that every row is computed under the version it should.

    A block's content tells the version of each row, so that reading rows of another
    version, or another request's, is an error.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.rounds, self.starts, self.batches = {}, defaultdict(list), []
        self.job, self.units, self.cost = {}, 0, []  # readers by request id
        self.probes = 0  # that were read to their end
        # (request, position) -> version under which the row was computed first
        self.obeyed = {}

    def run(self, output):
        orders = getattr(output, ORDERS, ())
        for request_id in output.finished_req_ids:
            self.job.pop(request_id, None)
        spent = 0
        for order in orders:
            if isinstance(order, Begin):
                self._begin(order)
            elif isinstance(order, Advance):
                spent += self._advance()
            elif isinstance(order, End):
                self._end(order)
            elif isinstance(order, Revise):
                self._revise(order)
        for new in output.scheduled_new_reqs:
            if PROBE in new.req_id:
                self.texts[new.req_id] = list(new.prompt_token_ids)
                self.salts[new.req_id] = None
        self.cost.append((spent, bool(output.num_scheduled_tokens)))
        return super().run(output)

    def _begin(self, order):
        assert not self.job, "two jobs at a time"
        works = [self.rounds[reader.request_id].work for reader in order.readers]
        assert all(work == works[0] for work in works)
        assert works[0].together or len(works) == 1
        for reader in order.readers:
            known, context = self.texts[reader.request_id], len(reader.tokens)
            assert context <= len(known)
            assert reader.tokens == known[:context]
            assert reader.number == len(self.starts[reader.request_id])
            self.job[reader.request_id] = reader
        self.units = 0
        self.batches.append(len(self.job))

    def _advance(self):
        lengths = [len(reader.tokens) for reader in self.job.values()]
        work = self.rounds[next(iter(self.job))].work
        cost = len(lengths) * work.cost(self.units, max(lengths))
        self.units += 1
        return cost

    def _end(self, order):
        reader, rounds = self.job.pop(order.request_id), self.rounds[order.request_id]
        assert self.units == len(rounds.work.passes)
        found = rounds.round(reader.number)
        assert order.start == (order.start if found.start is None else found.start)
        assert order.start >= found.context - 1
        self.starts[order.request_id].append(order.start)

    def _revise(self, order):
        rounds = self.rounds[order.request_id]
        assert rounds.work.probes
        found = rounds.round(len(self.starts[order.request_id]))
        assert order.start == (order.start if found.start is None else found.start)
        assert order.start >= found.context - 1
        self.starts[order.request_id].append(order.start)

    def _sample(self, counts, starts):
        output = super()._sample(counts, starts)
        for req_id, tokens in zip(counts, output.sampled_token_ids, strict=True):
            if PROBE in req_id and tokens:
                scores = torch.full((len(self.texts[req_id]) - 2, 1), -1.0)
                output.prompt_logprobs_dict[req_id] = LogprobsTensors(
                    torch.zeros_like(scores), scores, scores[:, 0]
                )
                self.probes += 1
        return output

    def version(self, req_id, position):
        return sum(start <= position for start in self.starts[req_id])

    def _keys(self, req_id, end):
        rounds, key = self.rounds.get(req_id), digest(self.salts[req_id])
        if PROBE in req_id:  # its rows obey a plan of its own
            key = digest(key, req_id)
        for position, token in enumerate(self.texts[req_id][:end]):
            key = digest(key, token)
            version = rounds and self.version(req_id, position)
            if version:
                key = digest(key, req_id, version)
            yield key

    def _write(self, req_id, start, count):
        rounds = self.rounds.get(req_id)
        if rounds is not None:
            versions = [self.version(req_id, p) for p in range(start, start + count)]
            assert len(set(versions)) <= MAX_VERSIONS
            for position, version in enumerate(versions, start):
                first = self.obeyed.setdefault((req_id, position), version)
                assert first == version, "a row is computed again under another version"
            self._check_awaited(req_id, rounds, start + count - 1)
        super()._write(req_id, start, count)

    def _check_awaited(self, req_id, rounds, last):
        found = rounds.round(len(self.starts[req_id]))
        if found is not None and found.start is not None:
            assert last < found.start, "a row is computed before its version is known"


class RoundWorker(Rounds, Worker):
    pass


class RoundWorkerV2(Rounds, WorkerV2):
    pass


def pretended(text, shape, number, arguments):
    """Ask as often as the work says, and check that each probe answers for the text."""
    edit = PlanEdit({"bias": np.ones((1, 2), np.float32)})
    assert (text.edit is None) == (number == 0)
    for count in arguments["probes"]:
        scores = yield [edit] * count
        assert [len(found) for found in scores] == [len(text.tokens) - 1] * count
    return Result("adapted", edit, {})


class RoundWorld(World):
    """A world whose requests may ask for rounds."""

    def __init__(self, vllm_config, num_blocks, block_size, depth, v2=False):
        super().__init__(vllm_config, num_blocks, block_size, depth, v2)
        max_num_reqs = vllm_config.scheduler_config.max_num_seqs
        self.worker = (
            RoundWorkerV2(block_size, max_num_reqs) if v2 else RoundWorker(block_size)
        )
        self.scheduler._jobs = {"pretended": pretended}

    def add(self, request_id, rounds=None, **asked):
        if rounds is not None:
            asked["extra_args"] = {ROUNDS: rounds.to_wire()}
            self.worker.rounds[request_id] = rounds
        super().add(request_id, **asked)

    def step(self):
        worked = super().step()
        return worked or self.worker.cost[-1][0] > 0
