# SPDX-License-Identifier: Apache-2.0
"""Log-likelihood of choices under any arm, contrast included, in transformers.

vLLM gives no prompt log-probabilities of a contrast: they would be one stream's alone.
Here the model reads the same tokens once under each routing, and the two logits of each
answer token go through the same `contrast_logits` that the engine uses. One pass per
routing serves every beta and alpha.

Source: the contrast's rule, SCMoE, arXiv 2405.14507, equations 4 and 5.
Differs: SCMoE generates; log-likelihood of choices under its rule is ours. A token that
is not plausible costs `IMPLAUSIBLE` nats, so that with alpha > 0 the choice with the
fewest such tokens wins before anything else counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from benchmarks.quality.arms import Arm
from benchmarks.quality.packing import (
    Encoded,
    Pack,
    encode,
    pack,
    packs,
    sums_by_choice,
)
from benchmarks.quality.tasks.question import ChoiceQuestion
from moe_tta.compiled import CompiledRequest
from moe_tta.kernels.contrast import COMBINE
from moe_tta.plan import RoutingPlan
from moe_tta.replica import routed
from moe_tta.shape import RouterShape

PACK_TOKENS = {"cpu": 512, "cuda": 8192}  # attention is quadratic in these
ROWS = 2  # of logits at a time: measured fastest of 1, 2, 4, 16, 64 on a Xeon


class TeacherForced:
    """A transformers model that scores given answers under arms.

    Args:
        folder: Checkpoint.
        shape: Its routers, as wide as the arms need.
        dtype: Name of the weights' type.

    Raises:
        RequestError: an arm asks what the model's routers cannot do.
        ValueError: an arm routes by where a token stands, which a pack does not know.
    """

    def __init__(
        self, folder: Path, shape: RouterShape, arms: Sequence[Arm], dtype: str
    ):
        from transformers import AutoModelForCausalLM

        self.streams = {arm: _streams(arm, shape) for arm in arms}
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.shape = shape
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), experts_implementation="eager"
        )
        self.model.to(self.device).eval()

    def score(
        self, questions: Sequence[ChoiceQuestion], arms: Sequence[Arm]
    ) -> Iterator[tuple[int, dict[Arm, list[float]]]]:
        """Score questions, pack by pack.

        Yields:
            Index of a question, and for each arm the summed log-likelihood, in nats,
            of its choices.
        """
        encoded = [encode(self.tokenizer, question) for question in questions]
        for group in packs(encoded, PACK_TOKENS[self.device]):
            sums = self.score_pack([encoded[i] for i in group], arms)
            sizes = [len(encoded[i].sequences) for i in group]
            parts = {arm: torch.tensor(v).split(sizes) for arm, v in sums.items()}
            for place, index in enumerate(group):
                yield index, {arm: p[place].tolist() for arm, p in parts.items()}

    @torch.inference_mode()
    def score_pack(
        self, questions: list[Encoded], arms: Sequence[Arm]
    ) -> dict[Arm, list[float]]:
        """Score the questions of one pack.

        Returns:
            For each arm the summed log-likelihood, in nats, of every choice in turn.
        """
        packed = pack(questions)
        logits: dict[str, torch.Tensor] = {}  # [N, V] of each routing once
        for arm in arms:
            for plan in self.streams[arm].plans:
                if _mark(plan) not in logits:
                    logits[_mark(plan)] = self._logits(packed, plan)
        found = {arm: [] for arm in arms}
        # a few rows under all arms at a time: they stay in the processor's cache
        for start in range(0, len(packed.targets), ROWS):
            rows = slice(start, start + ROWS)
            for arm in arms:
                stream = self.streams[arm]
                parts = [logits[_mark(plan)][rows] for plan in stream.plans]
                combined = parts[0]
                if stream.combination is not None:
                    combined = COMBINE[stream.combination](*parts, *stream.numbers)
                found[arm].append(_log_probs(combined, packed.targets[rows]))
        return {
            arm: sums_by_choice(torch.cat(parts), packed)
            for arm, parts in found.items()
        }

    def _logits(self, packed: Pack, plan: RoutingPlan | None) -> torch.Tensor:
        """Return the logits [N, V] float32 that predict the answer tokens."""
        hidden = torch.finfo(self.model.dtype).min
        mask = torch.zeros(packed.visible.shape, dtype=self.model.dtype)
        mask.masked_fill_(~packed.visible, hidden)
        with routed(self.model, self.shape, (plan,) * 3, prompt_len=1):
            output = self.model(
                input_ids=packed.tokens.to(self.device),
                position_ids=packed.positions.to(self.device),
                attention_mask=mask.to(self.device),
                logits_to_keep=packed.predictors.to(self.device),
                use_cache=False,
            )
        return output.logits[0].float()


@dataclass(frozen=True)
class _Streams:
    """The routings of an arm, and how two streams' logits become one."""

    plans: tuple[RoutingPlan | None, ...]
    combination: str | None = None
    numbers: tuple[float, ...] = ()


def _streams(arm: Arm, shape: RouterShape) -> _Streams:
    compiled = arm.compiled(shape)
    strong = _everywhere(arm, compiled)
    if compiled.pair is None:
        return _Streams((strong,))
    pair = compiled.pair
    return _Streams(
        (strong, _everywhere(arm, pair.weak)), pair.combination, pair.numbers
    )


def _everywhere(arm: Arm, compiled: CompiledRequest) -> RoutingPlan | None:
    if len({_mark(plan) for plan in compiled.plans}) > 1:
        raise ValueError(
            f"{arm.name}: choices are scored with one routing for the whole text, "
            "expected span 'all'"
        )
    return compiled.plans[0]


def _mark(plan: RoutingPlan | None) -> str:
    return "" if plan is None else plan.fingerprint


def _log_probs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [rows] of tokens [rows] under logits [rows, V]."""
    chosen = logits.gather(1, targets.to(logits.device)[:, None])[:, 0]
    return chosen - logits.logsumexp(dim=1)
