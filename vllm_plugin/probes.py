# SPDX-License-Identifier: Apache-2.0
"""Probes: requests of the engine's own that score a text under a candidate plan.

A probe reads the text once, as any prompt is read, and asks for the log-probabilities
of its tokens. So it works wherever plans do, whatever the weights' form and however
many devices share them. Only the scheduler knows of probes: a worker sees requests.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

import numpy as np

from moe_tta.compiled import CompiledRequest
from moe_tta.plan_edit import PlanEdit
from moe_tta.spec import PARAMETER
from moe_tta.vllm_plugin import compat
from moe_tta.vllm_plugin.round_orders import Reader
from moe_tta.vllm_plugin.services import Result

logger = compat.get_logger(__name__)

PROBE = "+probe-"  # between an owner's id and the probe's number

# yields edits of the model's own routing; is sent, for each, the natural logarithms of
# the probabilities of the text's tokens but the first [T - 1]; one list is a unit of
# `Work.passes`
ProbeJob = Generator[Sequence[PlanEdit], Sequence[np.ndarray], Result]


def make_probe(owner: Any, tokens: Sequence[int], edit: PlanEdit, number: int) -> Any:
    """Return the vLLM `Request` that scores tokens under an edit in every row.

    Args:
        owner: The `Request` whose round asks.
        tokens: The text.
        edit: Of the model's own routing.
        number: Of the scheduler's probes, never used before.
    """
    from vllm.sampling_params import SamplingParams

    plan = edit.applied(None, 0)
    extra_args = None
    if plan is not None:
        wire = CompiledRequest((plan,) * 3, (True,) * 3).to_wire()
        extra_args = {PARAMETER: wire}
    return type(owner)(
        request_id=f"{owner.request_id}{PROBE}{number}",
        prompt_token_ids=list(tokens),
        sampling_params=SamplingParams(
            temperature=0.0,
            max_tokens=1,
            prompt_logprobs=0,  # of the text's own tokens alone
            ignore_eos=True,
            detokenize=False,
            skip_reading_prefix_cache=True,
            extra_args=extra_args,
        ),
        pooling_params=None,
        client_index=owner.client_index,
        arrival_time=owner.arrival_time,
        priority=owner.priority,
        block_hasher=owner._block_hasher,
    )


def token_scores(output: Any | None) -> np.ndarray | None:
    """Return what a probe's last `EngineCoreOutput` says of its tokens [T - 1]."""
    found = None if output is None else output.new_prompt_logprobs_tensors
    return None if found is None else np.asarray(found.logprobs[:, 0], np.float64)


class ProbeRound:
    """A round that the engine does itself: a job and the probes that it waits for.

    What the job raises ends the round, not the engine.

    Attributes:
        reader: The round.
        wanted: The edits that the job asks about, not sent yet.
        waits: Ids of the probes on their way.
        result: What was found; `None` before the end.
    """

    def __init__(self, service: str, reader: Reader, job: ProbeJob):
        self.service, self.reader = service, reader
        self.wanted: Sequence[PlanEdit] = ()
        self.waits: set[str] = set()
        self.result: Result | None = None
        self._begun = time.monotonic()
        self._job = job
        self._scores: dict[str, np.ndarray | None] = {}
        self._go_on(lambda: next(job))

    @property
    def seconds(self) -> float:
        """Time since it began, with what others were served in it."""
        return time.monotonic() - self._begun

    def sent(self, probe_ids: Iterable[str]) -> None:
        """Wait for these probes, one for each edit that was wanted."""
        self._scores = dict.fromkeys(probe_ids)
        self.waits, self.wanted = set(self._scores), ()

    def take(self, probe_id: str, scores: np.ndarray | None) -> None:
        """Take in what became of a probe; after the last one the job goes on."""
        self.waits.remove(probe_id)
        self._scores[probe_id] = scores
        if self.waits:
            return
        answers = list(self._scores.values())
        if any(scores is None for scores in answers):
            logger.error("moe-tta: a probe of %s gave no scores", self._name)
            self.result = Result("failed", None, {})
        else:
            self._go_on(lambda: self._job.send(answers))

    @property
    def _name(self) -> str:
        return self.reader.request_id

    def _go_on(self, work: Callable[[], Sequence[PlanEdit]]) -> None:
        try:
            self.wanted = work()
        except StopIteration as end:
            self.result = end.value
        except Exception:
            logger.exception(
                "moe-tta: the round of %s failed; it goes on as before", self._name
            )
            self.result = Result("failed", None, {})
