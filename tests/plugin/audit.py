# SPDX-License-Identifier: Apache-2.0
"""Whether every row of every step is routed by its own request's plan, bit for bit.

What an engine generates in a crowd and alone differs by rounding on a GPU, so texts
say little. The audit keeps each layer's router logits and routing as the engine (its
graphs, too) made them and routes the same logits once more, by a table of its own: the
slot of a row follows from the request's object and the position that the model itself
was given, not from what the plugin staged.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch

from moe_tta.compile import compile_request
from moe_tta.kernels.reference import Routing
from moe_tta.kernels.route import RoutingKernel
from moe_tta.kernels.table import PlanTable
from moe_tta.spec import parse
from moe_tta.strategies import PlanContext
from moe_tta.vllm_plugin.gpu_router import GpuLayerRouting

JOB = "audit_job"  # member of `extra_args` that says whose request it is


class Recorder:
    """Each layer's last logits and routing, in buffers that graphs can write.

    `seen` holds the logits, weights and ids; `given` what vLLM's own router chose,
    where it runs and the kernel copies it for rows without a plan.
    """

    def __init__(self):
        self.seen: dict[int, list[torch.Tensor]] = {}
        self.given: dict[int, list[torch.Tensor]] = {}

    @contextmanager
    def recording(self):
        original = GpuLayerRouting._compute_routing

        def compute(routing, hidden_states, router_logits, *args, **kwargs):
            if not routing.follows_stock and routing.layer not in self.given:
                routing._stock = self._kept(routing.layer, routing._stock)
            found = original(routing, hidden_states, router_logits, *args, **kwargs)
            _keep(self.seen, routing.layer, (router_logits, *found))
            return found

        with mock.patch.object(GpuLayerRouting, "_compute_routing", compute):
            yield self

    def _kept(self, layer, stock):
        def kept(*args, **kwargs):
            found = stock(*args, **kwargs)
            _keep(self.given, layer, found)
            return found

        return kept


def _keep(buffers, layer, parts):
    if layer not in buffers:  # the first call is the largest batch
        buffers[layer] = [torch.empty_like(part) for part in parts]
    for buffer, part in zip(buffers[layer], parts, strict=True):
        buffer[: len(part)].copy_(part)


class Audit:
    """Follows a model runner with armed GPU layers.

    Args:
        runner: vLLM's, V1 or V2, in this process.
        shape: The model's `RouterShape`.
        requests: The `moe_tta` objects of all jobs.
        prompt_lens: Their prompts' lengths, in tokens.
        recorder: Was recording when the engine was made.
    """

    def __init__(self, runner, shape, requests, prompt_lens: Sequence[int], recorder):
        self.recorder, self.device = recorder, runner.device
        self.jobs: dict[str, int] = {}
        self.rows = self.planned_rows = self.chunks = 0
        self.wrong = torch.zeros((), dtype=torch.int64, device=self.device)
        self.prompt_lens = np.array(prompt_lens)
        self.slots, plans = self._number(shape, requests)
        table = PlanTable(shape, len(plans), self.device)
        table.write(dict(enumerate(plans, start=1)))
        self.armed = runner.moe_tta.armed
        self.kernels = [
            RoutingKernel(
                *(table.layer(index), routing.kernel.rule, routing.kernel.width),
                routing.layer,
                model_rows=routing.kernel.model_rows,
                skip_unused=routing.skips_unused,
            )
            for index, routing in enumerate(self.armed)
        ]
        self._step = None
        self._follow(runner)

    @staticmethod
    def _number(shape, requests):
        """Return the slots [jobs, 3] of each job's segments, and the plans by slot."""
        numbers, plans, slots = {}, [], []
        for request in requests:
            found = compile_request(
                parse(request or {}, presets={}), PlanContext(shape)
            )
            row = []
            for plan in found.plans:
                name = None if plan is None else plan.fingerprint
                if name is not None and name not in numbers:
                    plans.append(plan)
                    numbers[name] = len(plans)
                row.append(0 if name is None else numbers[name])
            slots.append(row)
        return np.array(slots, np.int32), plans

    def _follow(self, runner):
        def learn(original):
            def wrapped(scheduler_output):
                for new in scheduler_output.scheduled_new_reqs:
                    extra = new.sampling_params.extra_args or {}
                    if JOB in extra:
                        self.jobs[new.req_id] = extra[JOB]
                return original(scheduler_output)

            return wrapped

        def note(original):
            def wrapped(*args, **kwargs):
                result = original(*args, **kwargs)
                self._step = self._step_of(runner, result, args)
                return result

            return wrapped

        def check(original):
            def wrapped(*args, **kwargs):
                self._step = None
                result = original(*args, **kwargs)
                if self._step is not None:
                    self._check(*self._step)
                return result

            return wrapped

        is_v1 = hasattr(runner, "_update_states")
        for name, make in (
            ("_update_states" if is_v1 else "add_requests", learn),
            ("_prepare_inputs" if is_v1 else "prepare_inputs", note),
            ("execute_model", check),
        ):
            setattr(runner, name, make(getattr(runner, name)))

    def _step_of(self, runner, result, args):
        """Return (jobs [T], -1 for others; positions [T]) of the step's rows."""
        if hasattr(runner, "_update_states"):
            req_ids, counts = runner.input_batch.req_ids, np.asarray(args[1])
            positions = runner.positions[: counts.sum()]
        else:
            req_ids, counts = result.req_ids, result.num_scheduled_tokens
            positions = result.positions[: counts.sum()]
        jobs = [self.jobs.get(req_id, -1) for req_id in req_ids]
        self.chunks += int((counts > 1).sum())
        return np.repeat(jobs, counts), positions.to(torch.int64).clone()

    def _check(self, jobs, positions):
        at = positions.cpu().numpy()
        lens = self.prompt_lens[jobs]
        segment = (at >= lens - 1).astype(int) + (at >= lens)
        slots = np.where(jobs < 0, 0, self.slots[jobs, segment]).astype(np.int32)
        self.rows += len(jobs)
        self.planned_rows += int((slots > 0).sum())
        slots = torch.from_numpy(slots).to(self.device)
        first = slice(len(jobs))
        for routing, kernel in zip(self.armed, self.kernels, strict=True):
            logits, weights, ids = (
                part[first] for part in self.recorder.seen[routing.layer]
            )
            given = self.recorder.given.get(routing.layer)
            if given is not None:
                given = Routing(*(part[first] for part in given))
            want = kernel(logits, slots, positions, None, given)
            wrong = (want.topk_ids != ids).any(1)
            wrong |= (want.topk_weights != weights).any(1)
            self.wrong += wrong.sum()
