# SPDX-License-Identifier: Apache-2.0
"""Rows: which slot each token row of the step obeys, by absolute position."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from moe_tta.kernels.table import Features
from moe_tta.spec import PARAMETER
from moe_tta.vllm_plugin import compat
from moe_tta.vllm_plugin.slots import SlotTable

if TYPE_CHECKING:
    from moe_tta.vllm_plugin.versions import Requests


@dataclass(frozen=True)
class PlannedRequest:
    """A request with a plan, as the worker knows it.

    `prompt_len` is where its prompt ends for the plans.
    `segments` names the plan (by fingerprint) of the prompt's body, its last token
    and the generated tokens; `None` is the model's own rule.
    """

    prompt_len: int
    segments: tuple[str | None, str | None, str | None]
    plans: Mapping[str, bytes]

    @staticmethod
    def from_new(new_request: Any) -> PlannedRequest | None:
        """Read the wire form that admission attached; `None` without one."""
        params = new_request.sampling_params
        wire = (params.extra_args or {}).get(PARAMETER) if params else None
        if not wire:
            return None
        prompt_len = wire["prompt_tokens"] or new_request.prompt_len
        return PlannedRequest(prompt_len, tuple(wire["segments"]), wire["plans"])

    def runs(self, start: int, count: int) -> Iterator[tuple[int, int, str]]:
        """Yield (first, end, fingerprint) for the planned rows of a chunk.

        Args:
            start: Absolute position of the chunk's first token.
            count: Number of tokens in the chunk; offsets count from its start.
        """
        if start >= self.prompt_len:  # decoding, the common case
            if self.segments[2] is not None:
                yield 0, count, self.segments[2]
            return
        edges = (0, self.prompt_len - 1, self.prompt_len, start + count)
        for index, fingerprint in enumerate(self.segments):
            first = max(edges[index], start) - start
            end = min(edges[index + 1], start + count) - start
            if fingerprint is not None and first < end:
                yield first, end, fingerprint


class Decoding(NamedTuple):
    """A step after which the next one may be staged already.

    Every request with a plan generates: as long as the batch stays the same, so do the
    rows' plans. `floors` [num_reqs] is the lowest position for which that holds, 0
    without a plan; `known` are the requests, or `None` without a plan.
    """

    req_ids: Sequence[str]
    known: Sequence[PlannedRequest | None]
    num_scheduled: np.ndarray
    floors: np.ndarray

    @staticmethod
    def of(
        requests: Requests,
        req_ids: Sequence[str],
        num_scheduled: np.ndarray,
        num_computed: np.ndarray,
    ) -> Decoding | None:
        """Return the step if it is one; for the arguments see `StepRows.stage`."""
        known = [requests.get(req_id) for req_id in req_ids]
        if any(type(found) not in (PlannedRequest, type(None)) for found in known):
            return None  # versions begin at positions of their own
        floors = np.array([found.prompt_len if found else 0 for found in known])
        if (num_computed < floors).any():
            return None
        return Decoding(list(req_ids), known, num_scheduled.copy(), floors)

    def goes_on(
        self,
        requests: Requests,
        req_ids: Sequence[str],
        num_scheduled: np.ndarray,
        num_computed: np.ndarray,
    ) -> bool:
        """Whether a step has the same rows with the same plans."""
        return (
            self.req_ids == list(req_ids)
            and np.array_equal(self.num_scheduled, num_scheduled)
            and bool((num_computed >= self.floors).all())
            and all(map(is_, map(requests.get, req_ids), self.known))
        )


class StepRows:
    """The step's rows in buffers of fixed address.

    `slots` [max_tokens] int32 and `positions` [max_tokens] int64 are what kernels
    read; `num_planned` is how many rows of the step have a plan. On CPU, `planned`
    lists the rows whose slot is not 0 (`None` when there are none), so that the others
    cost nothing. `asking` [1 + max_tokens] int32 is how many rows have a plan that
    names a token memory in some layer, then their numbers, for kernels alone.
    """

    def __init__(self, max_tokens: int, device: torch.device, slots: SlotTable):
        self.slot_table = slots
        self._slots = np.zeros(max_tokens, np.int32)
        self._positions = np.zeros(max_tokens, np.int64)
        self.on_cpu = device.type == "cpu"
        self.slots = torch.from_numpy(self._slots).to(device)
        self.positions = torch.from_numpy(self._positions).to(device)
        self._asking = np.zeros(1 + max_tokens, np.int32)
        self.asking = torch.from_numpy(self._asking).to(device)
        self.planned: torch.Tensor | None = None
        self.features = Features(0)
        self.num_planned = 0
        self._used = 0
        self._staged: list[tuple[int, int, str]] = []
        self._decoding: Decoding | None = None

    def stage(
        self,
        requests: Requests,
        req_ids: Sequence[str],
        num_scheduled: np.ndarray,
        num_computed: np.ndarray,
    ) -> None:
        """Write the step's rows; every row not planned here obeys slot 0.

        Args:
            requests: Requests with a plan, by id.
            req_ids: The step's requests in batch order.
            num_scheduled: [num_reqs] tokens of each request in this step.
            num_computed: [num_reqs] absolute position of each one's first token.
        """
        if not requests:
            self.clear()
            return
        step = requests, req_ids, num_scheduled, num_computed
        if self._decoding is not None and self._decoding.goes_on(*step):
            return
        runs, plans, offset = [], {}, 0
        for req_id, count, start in zip(
            req_ids, num_scheduled.tolist(), num_computed.tolist(), strict=True
        ):
            request = requests.get(req_id)
            if request is not None:
                for first, end, name in request.runs(start, count):
                    runs.append((offset + first, offset + end, start + first, name))
                    plans[name] = request.plans[name]
            offset += count
        self._write(runs, self.slot_table.assign(plans))
        draws = self.features & Features.SAMPLE  # by each row's position
        self._decoding = None if draws else Decoding.of(*step)

    def clear(self) -> None:
        """Give every row back to the model's own rule."""
        self._decoding = None
        if self._staged:  # slots are pinned for staged rows alone
            self._write([], self.slot_table.assign({}))

    def _write(
        self, runs: list[tuple[int, int, int, str]], slots: dict[str, int]
    ) -> None:
        staged = [(first, end, name) for first, end, _, name in runs]
        # requests without plans come and go behind; positions matter to draws alone
        if staged == self._staged and not self.features & Features.SAMPLE:
            return
        self._staged = staged
        self._slots[: self._used] = 0
        before, self._used = self._used, 0
        self.num_planned = sum(end - first for first, end, _, _ in runs)
        if runs:
            self._fill(runs, slots)
            self._used = runs[-1][1]
        self.features = self.slot_table.features()
        if self.on_cpu:
            rows = np.flatnonzero(self._slots[: self._used])
            self.planned = torch.from_numpy(rows) if len(rows) else None
            return
        # vLLM's pinned staging: a block is not reused before its copy is done
        changed = max(before, self._used)
        compat.copy_to_device(self._slots[:changed], self.slots[:changed])
        if self.features & Features.SAMPLE:
            used = slice(self._used)
            compat.copy_to_device(self._positions[used], self.positions[used])
        self._list_asking(runs, slots)

    def _list_asking(
        self, runs: list[tuple[int, int, int, str]], slots: dict[str, int]
    ) -> None:
        before, count = self._asking[0], 0
        if self.features & Features.RECALL:
            features = self.slot_table.table.features
            for first, end, _, name in runs:
                if features(slots[name]) & Features.RECALL:
                    rows = np.arange(first, end)
                    self._asking[1 + count : 1 + count + len(rows)] = rows
                    count += len(rows)
        if before or count:
            self._asking[0], used = count, slice(1 + count)
            compat.copy_to_device(self._asking[used], self.asking[used])

    def _fill(
        self, runs: list[tuple[int, int, int, str]], slots: dict[str, int]
    ) -> None:
        """Write slots and positions of all runs at once."""
        first, end, position, slot = np.array(
            [(first, end, position, slots[name]) for first, end, position, name in runs]
        ).T
        counts = end - first
        starts = np.cumsum(counts) - counts
        within = np.arange(counts.sum()) - np.repeat(starts, counts)
        rows = within + np.repeat(first, counts)
        self._slots[rows] = np.repeat(slot, counts)
        self._positions[rows] = within + np.repeat(position, counts)
