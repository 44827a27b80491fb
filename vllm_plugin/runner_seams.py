# SPDX-License-Identifier: Apache-2.0
"""Seams in the worker: the model runner it owns, V1 or V2, wrapped per instance."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from moe_tta.vllm_plugin.compat import wrap
from moe_tta.vllm_plugin.cpu_seeds import hide_unused, rewound
from moe_tta.vllm_plugin.pair_rows import give_followers_tokens
from moe_tta.vllm_plugin.round_seams import follow_rounds

if TYPE_CHECKING:
    from moe_tta.vllm_plugin.worker import WorkerState


def hook_worker(original: Callable) -> Callable:
    """Follow the worker's model runner as soon as it exists."""

    def init_device(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        hook_runner(self.worker.model_runner)
        return result

    return init_device


def hook_runner(runner: Any) -> None:
    """Follow one model runner: arm after loading, stage rows before each step."""
    from moe_tta.vllm_plugin.worker import WorkerState

    state: WorkerState = WorkerState(runner.vllm_config, runner.device)
    runner.moe_tta = state
    is_v1 = hasattr(runner, "_update_states")

    def load_model(original):
        def wrapped(*args, **kwargs):
            result = original(*args, **kwargs)
            state.arm(moe_runners(runner.vllm_config))
            state.load_services(runner.get_model())
            if state.rounds is not None:
                follow_rounds(runner, state)
            if not is_v1 and runner.sampler is not None:  # None with pooling
                _pair_sampler_v2(runner.sampler, state)
            return result

        return wrapped

    wrap(runner, "load_model", load_model)
    if is_v1:
        _follow_v1(runner, state)
    else:
        _follow_v2(runner, state)


def moe_runners(vllm_config: Any) -> list[Any]:
    """Return the MoE layers of the loaded model, by decoder layer."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner_interface import (
        MoERunnerInterface,
    )

    layers = vllm_config.compilation_config.static_forward_context.values()
    runners = [layer for layer in layers if isinstance(layer, MoERunnerInterface)]
    return sorted(runners, key=lambda runner: runner.layer_id)


def _follow_requests(state: WorkerState) -> Callable[[Callable], Callable]:
    """Tell the state who came and who went, before the runner's own bookkeeping."""

    def make(original):
        def wrapped(scheduler_output):
            state.requests_changed(
                scheduler_output.finished_req_ids, scheduler_output.scheduled_new_reqs
            )
            return original(scheduler_output)

        return wrapped

    return make


def _follow_v1(runner: Any, state: WorkerState) -> None:
    """V1 runner: the batch order is final after `_update_states`."""
    on_cpu = runner.device.type == "cpu"

    def prepare_inputs(original):
        def wrapped(scheduler_output, num_scheduled_tokens):
            batch = runner.input_batch
            state.stage(
                batch.req_ids,
                num_scheduled_tokens,
                batch.num_computed_tokens_cpu[: batch.num_reqs],
            )
            return original(scheduler_output, num_scheduled_tokens)

        return wrapped

    def sample(original):
        # the grammar's mask is on the lead's logits already, nothing else is
        def wrapped(logits, spec_decode_metadata):
            rows = state.pairs.rows(runner.input_batch.req_ids)
            with rewound(runner) if on_cpu else nullcontext():
                combined = state.pairs.combine(logits, rows)
                output = original(combined, spec_decode_metadata)
            give_followers_tokens(output.sampled_token_ids, rows)
            return output

        return wrapped

    wrap(runner, "_update_states", _follow_requests(state))
    wrap(runner, "_prepare_inputs", prepare_inputs)
    wrap(runner, "_sample", sample)
    if on_cpu:
        wrap(runner, "_bookkeeping_sync", hide_unused(runner))


def _follow_v2(runner: Any, state: WorkerState) -> None:
    """V2 runner: resumed requests come back as new ones, with their full text."""

    def prepare_inputs(original):
        def wrapped(*args, **kwargs):
            batch = original(*args, **kwargs)
            state.stage(
                batch.req_ids, batch.num_scheduled_tokens, batch.num_computed_tokens_np
            )
            return batch

        return wrapped

    wrap(runner, "add_requests", _follow_requests(state))
    wrap(runner, "prepare_inputs", prepare_inputs)


def _pair_sampler_v2(sampler: Any, state: WorkerState) -> None:
    """Combine between the grammar's mask and the sampler, which is called, not named.

    Python looks `__call__` up on the class: the sampler gets a subclass of its own.
    """
    original = type(sampler)

    def call(self, logits, input_batch):
        rows = state.pairs.rows(input_batch.req_ids)
        output = original.__call__(self, state.pairs.combine(logits, rows), input_batch)
        give_followers_tokens(output.sampled_token_ids, rows)
        return output

    sampler.__class__ = type(original.__name__, (original,), {"__call__": call})


def worker_status(worker: Any) -> dict[str, Any]:
    """`collective_rpc("moe_tta_status")`: what this worker armed and holds."""
    return worker.model_runner.moe_tta.status()
