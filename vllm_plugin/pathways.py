# SPDX-License-Identifier: Apache-2.0
"""Pathways: what the routers of an eager engine gave each prompt's last token.

Off unless `collective_rpc("moe_tta_record", args=(True,))` starts it. A pathway is the
distribution over all experts before any plan, as the model's own rule sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from moe_tta.vllm_plugin.worker import WorkerState


class PathwayRecorder:
    """Keeps the last prompt row of each request until it is taken.

    A prompt that is read again after preemption overwrites what it left. The mean
    hidden state covers the prompt rows that were computed: not those that were found in
    the prefix cache.

    Args:
        num_experts: Experts of a layer; router logits may have more columns.
    """

    def __init__(self, num_experts: int):
        self._num_experts = num_experts
        self._ends: dict[str, int] = {}
        self._last: list[tuple[str, int]] = []  # (request, row of the step)
        self._prompt: list[tuple[str, int, int, int]] = []  # with start and end rows
        self._layers: dict[str, list[torch.Tensor]] = {}
        self._hidden: dict[str, torch.Tensor] = {}
        self._sums: dict[str, tuple[torch.Tensor, int]] = {}
        self._undo: list[Callable[[], None]] = []

    def attach(self, runners: Sequence[Any], model: torch.nn.Module) -> None:
        """Listen to the routers and to the model's final hidden states."""
        for index, runner in enumerate(runners):
            self._listen(index, runner.router)
        handle = model.register_forward_hook(self._take_hidden)
        self._undo.append(handle.remove)

    def detach(self) -> None:
        """Stop listening."""
        while self._undo:
            self._undo.pop()()

    def _listen(self, index: int, router: Any) -> None:
        inner = router._compute_routing

        def compute_routing(hidden_states, router_logits, *args, **kwargs):
            self._take_logits(index, router_logits)
            return inner(hidden_states, router_logits, *args, **kwargs)

        def restore():
            router._compute_routing = inner

        router._compute_routing = compute_routing
        self._undo.append(restore)

    def requests_changed(self, new: Iterable[Any]) -> None:
        """Note where the prompts of new requests end."""
        for request in new:
            self._ends[request.req_id] = request.prompt_len

    def begin_step(
        self,
        req_ids: Sequence[str],
        num_scheduled: np.ndarray,
        num_computed: np.ndarray,
    ) -> None:
        """Note which rows of the coming step belong to prompts, and which end one."""
        self._last, self._prompt, offset = [], [], 0
        for req_id, count, start in zip(
            req_ids, num_scheduled.tolist(), num_computed.tolist(), strict=True
        ):
            end = self._ends.get(req_id, 0)
            if start < end:
                stop = min(count, end - start)
                self._prompt.append((req_id, start, offset, offset + stop))
                if start + count >= end:
                    self._last.append((req_id, offset + end - 1 - start))
                    self._layers[req_id] = []
            offset += count

    def _take_logits(self, index: int, router_logits: torch.Tensor) -> None:
        if not self._last:
            return
        rows = [row for _, row in self._last]
        logits = router_logits[rows, : self._num_experts].float()
        shares = torch.softmax(logits, dim=1).cpu()
        for (req_id, _), share in zip(self._last, shares, strict=True):
            layers = self._layers[req_id]
            if len(layers) == index:
                layers.append(share)

    def _take_hidden(self, module: Any, inputs: Any, output: Any) -> None:
        if not self._prompt:
            return
        hidden = output[0] if isinstance(output, tuple) else output
        for req_id, row in self._last:
            self._hidden[req_id] = hidden[row].float().cpu()
        for req_id, start, first, end in self._prompt:
            total, count = self._sums.get(req_id, (0, 0)) if start else (0, 0)
            total = total + hidden[first:end].float().sum(dim=0).cpu()
            self._sums[req_id] = total, count + end - first

    def take(self) -> dict[str, dict[str, bytes]]:
        """Return and forget what was kept, by request, as raw float32.

        `pathway` [L, E], `hidden_last` [H] and `hidden_mean` [H].
        """
        taken = {}
        for req_id, hidden in self._hidden.items():
            total, count = self._sums[req_id]
            taken[req_id] = {
                "pathway": torch.stack(self._layers[req_id]).numpy().tobytes(),
                "hidden_last": hidden.numpy().tobytes(),
                "hidden_mean": (total / count).numpy().tobytes(),
            }
            del self._ends[req_id]
        for kept in (self._layers, self._hidden, self._sums):
            kept.clear()
        return taken


def record(worker: Any, on: bool) -> None:
    """`collective_rpc("moe_tta_record", args=(on,))`: start or stop recording."""
    from moe_tta.vllm_plugin.runner_seams import moe_runners

    runner = worker.model_runner
    state: WorkerState = runner.moe_tta
    if state.recorder is not None:
        state.recorder.detach()
        state.recorder = None
    if on:
        state.recorder = PathwayRecorder(state.shape.num_experts)
        state.recorder.attach(moe_runners(runner.vllm_config), runner.get_model())


def take(worker: Any) -> dict[str, dict[str, bytes]]:
    """`collective_rpc("moe_tta_take_pathways")`: what was recorded since the last."""
    return worker.model_runner.moe_tta.recorder.take()
