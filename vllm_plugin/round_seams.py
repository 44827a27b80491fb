# SPDX-License-Identifier: Apache-2.0
"""Seams of rounds: orders into the worker, reports from there to the completion."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import TYPE_CHECKING, Any

from moe_tta.vllm_plugin import round_metrics, round_records
from moe_tta.vllm_plugin.compat import wrap
from moe_tta.vllm_plugin.round_orders import REPORTS

if TYPE_CHECKING:
    from moe_tta.vllm_plugin.worker import WorkerState


def follow_rounds(runner: Any, state: WorkerState) -> None:
    """Obey a step's orders before it; send reports with its output."""

    def execute_model(original):
        def wrapped(scheduler_output, *args, **kwargs):
            state.obey(scheduler_output)
            return _with_reports(original(scheduler_output, *args, **kwargs), state)

        return wrapped

    def sample_tokens(original):
        def wrapped(*args, **kwargs):
            return _with_reports(original(*args, **kwargs), state)

        return wrapped

    wrap(runner, "execute_model", execute_model)
    wrap(runner, "sample_tokens", sample_tokens)


def _with_reports(output: Any, state: WorkerState) -> Any:
    """Return a step's output with the reports that wait; `None` has none to carry."""
    from vllm.v1.outputs import ModelRunnerOutput

    if output is None:
        return None
    reports = state.rounds.take_reports()
    if not reports:
        return output
    if isinstance(output, ModelRunnerOutput):
        return _carrying(output, reports)
    get_output = output.get_output  # of Model Runner V2 or asynchronous scheduling
    output.get_output = lambda: _carrying(get_output(), reports)
    return output


def _carrying(output: Any, reports: list[Any]) -> Any:
    output = copy(output)  # vLLM shares one empty output between all steps
    setattr(output, REPORTS, reports)
    return output


def take_reports(original: Callable) -> Callable:
    """Keep each request's reports, and hide them from vLLM's own outputs."""

    def process_outputs(self, engine_core_outputs, *args, **kwargs):
        for output in engine_core_outputs:
            if not output.kv_transfer_params:
                continue
            reports = output.kv_transfer_params.pop(REPORTS, None)
            if reports is None:
                continue
            output.kv_transfer_params = output.kv_transfer_params or None
            state = self.request_states.get(output.request_id)
            if state is not None:
                state.moe_tta = [*getattr(state, "moe_tta", ()), *reports]
                round_records.of_process().keep(
                    state.external_req_id, state.request_index, state.moe_tta
                )
            round_metrics.observe(self.moe_tta_model, reports)
        return original(self, engine_core_outputs, *args, **kwargs)

    return process_outputs


def show_reports(original: Callable) -> Callable:
    """Put a request's rounds so far on its completion, as `moe_tta`."""

    def new_completion_output(self, *args, **kwargs):
        completion = original(self, *args, **kwargs)
        reports = getattr(self, "moe_tta", None)
        completion.moe_tta = None if reports is None else {"rounds": reports}
        return completion

    return new_completion_output
