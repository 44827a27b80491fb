# SPDX-License-Identifier: Apache-2.0
"""Requests that only the scheduler knows of: what the outside is not to count."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from vllm.v1.request import RequestStatus


def take_outputs(
    outputs: Mapping[int, Any], request_ids: Collection[str]
) -> dict[str, Any]:
    """Take what a step says of requests out of what clients are told.

    Args:
        outputs: `EngineCoreOutputs` by client, changed.
        request_ids: Of hidden requests.

    Returns:
        The last `EngineCoreOutput` of each that has one, by request.
    """
    taken = {}
    for client in outputs.values() if request_ids else ():
        told = []
        for output in client.outputs:
            if output.request_id in request_ids:
                taken[output.request_id] = output
            else:
                told.append(output)
        client.outputs = told
    return taken


def leave_out(stats: Any, scheduler: Any, request_ids: Iterable[str]) -> int:
    """Take requests out of a step's `SchedulerStats`, and count those that run.

    Args:
        stats: Changed.
        scheduler: That made them.
        request_ids: Of hidden requests; those that have ended count nowhere.
    """
    running = 0
    for request_id in request_ids:
        request = scheduler.requests.get(request_id)
        if request is None:
            continue
        if request.status == RequestStatus.RUNNING:
            stats.num_running_reqs -= 1
            running += 1
        elif request in scheduler.deferred_waiting:
            stats.num_skipped_waiting_reqs -= 1
        else:
            stats.num_waiting_reqs -= 1
    return running


def leave_unsaid(scheduler: Any, request: Any) -> None:
    """Do not tell clients that a hidden request has ended."""
    told = scheduler.finished_req_ids_dict
    if told is not None:
        told[request.client_index].discard(request.request_id)
