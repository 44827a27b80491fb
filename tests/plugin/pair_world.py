# SPDX-License-Identifier: Apache-2.0
"""A scheduler with pairs and a pretend worker that checks every block it reads."""

import hashlib
from collections import deque

from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
)
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from moe_tta.vllm_plugin.pair_scheduler import paired
from moe_tta.vllm_plugin.pairs import FOLLOWER, PAIR, Ask

VOCAB = 40


def digest(*parts):
    return hashlib.sha256(repr(parts).encode()).digest()


def next_token(request_id, position):
    """What the pretend model says: the same whenever it is asked again."""
    lead = request_id.removesuffix(FOLLOWER)
    return digest(lead, position)[0] % VOCAB


class Worker:
    """Knows blocks by the text that was written into them.

    Reading a position that holds another text, another salt's or none at all is an
    error, and so is a request of a pair that samples without its partner.
    """

    def __init__(self, block_size):
        self.block_size = block_size
        self.content = {}
        self.texts, self.blocks, self.salts = {}, {}, {}

    def add(self, request):
        self.texts[request.request_id] = list(request.prompt_token_ids)
        self.salts[request.request_id] = request.cache_salt

    def run(self, output):
        for new in output.scheduled_new_reqs:
            self.blocks[new.req_id] = list(new.block_ids[0])
            assert new.num_computed_tokens < len(self.texts[new.req_id])
        cached = output.scheduled_cached_reqs
        starts = {n.req_id: n.num_computed_tokens for n in output.scheduled_new_reqs}
        for req_id, blocks, start in zip(
            cached.req_ids,
            cached.new_block_ids,
            cached.num_computed_tokens,
            strict=True,
        ):
            given = [] if blocks is None else list(blocks[0])
            if req_id in cached.resumed_req_ids:
                self.blocks[req_id] = []
                self.texts[req_id] = list(cached.all_token_ids[req_id])
            self.blocks[req_id] += given
            starts[req_id] = start
        counts = output.num_scheduled_tokens
        for req_id, count in counts.items():
            self._write(req_id, starts[req_id], count)
        for req_id, count in counts.items():
            self._read(req_id, starts[req_id] + count)
        return self._sample(counts, starts)

    def _keys(self, req_id, end):
        key = digest(self.salts[req_id])
        for token in self.texts[req_id][:end]:
            key = digest(key, token)
            yield key

    def _place(self, req_id, position):
        block = self.blocks[req_id][position // self.block_size]
        return block, position % self.block_size

    def _write(self, req_id, start, count):
        keys = list(self._keys(req_id, start + count))
        assert len(keys) == start + count, "scheduled past the text"
        for position in range(start, start + count):
            self.content[self._place(req_id, position)] = keys[position]

    def _read(self, req_id, end):
        for position, key in enumerate(self._keys(req_id, end)):
            assert self.content.get(self._place(req_id, position)) == key, (
                f"{req_id} reads another text at {position}"
            )

    def _sample(self, counts, starts):
        sampled = []
        done = {r for r in counts if starts[r] + counts[r] == len(self.texts[r])}
        for req_id in counts:
            partner = req_id.removesuffix(FOLLOWER)
            if partner == req_id:
                partner = req_id + FOLLOWER
            if partner in self.texts and req_id in done:
                assert partner in done, f"{req_id} samples alone"
                # the partner may have been given its token already
                assert (
                    starts[partner] + counts[partner] == starts[req_id] + counts[req_id]
                )
        for req_id in counts:
            token = next_token(req_id, len(self.texts[req_id]))
            sampled.append([token] if req_id in done else [])
        for req_id, tokens in zip(counts, sampled, strict=True):
            self.texts[req_id] += tokens
        return ModelRunnerOutput(
            req_ids=list(counts),
            req_id_to_index={req_id: i for i, req_id in enumerate(counts)},
            sampled_token_ids=sampled,
        )


class WorkerV2(Worker):
    """Holds requests as Model Runner V2 does: in places that it must be told to free.

    Preempted requests give theirs back and return as new ones with their whole text.
    """

    def __init__(self, block_size, max_num_reqs):
        super().__init__(block_size)
        self.max_num_reqs, self.held = max_num_reqs, set()

    def run(self, output):
        self.held -= output.finished_req_ids | (output.preempted_req_ids or set())
        assert not output.scheduled_cached_reqs.resumed_req_ids
        for new in output.scheduled_new_reqs:
            assert new.req_id not in self.held, f"{new.req_id} was never given back"
            self.held.add(new.req_id)
            assert len(self.held) <= self.max_num_reqs, "no place is free"
            self.texts[new.req_id] = list(new.prefill_token_ids)
        assert output.num_scheduled_tokens.keys() <= self.held
        return super().run(output)


class World:
    """One scheduler, its worker, and the answers that came out."""

    def __init__(self, vllm_config, num_blocks, block_size, depth, v2=False):
        self.config, self.depth = vllm_config, depth
        vllm_config.cache_config.block_size = block_size
        vllm_config.cache_config.num_gpu_blocks = num_blocks
        spec = FullAttentionSpec(
            block_size=block_size, num_kv_heads=1, head_size=1, dtype="float32"
        )
        kv_cache = KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)])
        kind = AsyncScheduler if depth > 1 else Scheduler
        self.scheduler = paired(kind)(
            vllm_config=vllm_config,
            kv_cache_config=kv_cache,
            structured_output_manager=StructuredOutputManager(vllm_config),
            block_size=block_size,
            log_stats=True,
        )
        self.scheduler.use_v2_model_runner = v2
        max_num_reqs = vllm_config.scheduler_config.max_num_seqs
        self.worker = WorkerV2(block_size, max_num_reqs) if v2 else Worker(block_size)
        init_none_hash(digest)
        self.hasher = get_request_block_hasher(block_size, digest)
        self.flying = deque()
        self.answers, self.ended = {}, {}

    def add(self, request_id, prompt, salt, pair, priority, arrival, **params):
        sampling = SamplingParams(temperature=0, **params)
        if pair is not None:
            ask = Ask("contrast", (0.5, 0.1), {}, pair)
            sampling.extra_args = {PAIR: ask.to_wire()}
        request = Request(
            request_id=request_id,
            prompt_token_ids=prompt,
            sampling_params=sampling,
            pooling_params=None,
            arrival_time=arrival,
            cache_salt=salt,
            priority=priority,
            block_hasher=self.hasher,
        )
        self.scheduler.add_request(request)
        for added in (request_id, request_id + FOLLOWER):
            if added in self.scheduler.requests:
                self.worker.add(self.scheduler.requests[added])
        self.answers[request_id] = []

    def abort(self, request_id):
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)
        self.ended[request_id] = "aborted"

    def step(self):
        """Schedule a step; take in the oldest one's output once enough are flying."""
        output = self.scheduler.schedule()
        self.flying.append((output, self.worker.run(output)))
        stats = self.scheduler.make_stats()
        assert stats.num_running_reqs >= 0
        assert stats.num_waiting_reqs + stats.num_skipped_waiting_reqs >= 0
        if len(self.flying) >= self.depth or not output.num_scheduled_tokens:
            self._take()
        return bool(output.num_scheduled_tokens)

    def _take(self):
        outputs = self.scheduler.update_from_output(*self.flying.popleft())
        for client in outputs.values():
            for output in client.outputs:
                self.answers[output.request_id] += output.new_token_ids
                if output.finish_reason is not None:
                    self.ended[output.request_id] = str(output.finish_reason)

    def drain(self):
        while self.flying:
            self._take()
