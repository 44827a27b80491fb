# SPDX-License-Identifier: Apache-2.0
"""vLLM as the builder of stores uses it: answers judged, pathways recorded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from moe_tta.remix.build import Recorded, Verdict
from moe_tta.remix.card import ModelCard
from moe_tta.remix.errors import StoreError
from moe_tta.remix.questions import Question, Score, chosen, is_right
from moe_tta.vllm_plugin.stores import model_card

ANSWER_TOKENS = 32  # of free text


def start_engine(model: str, dtype: str, max_model_len: int | None) -> Any:
    """Start vLLM in this process, eager and with the plugin.

    Raises:
        StoreError: the plugin is off.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM

    return LLM(
        model=model,
        dtype=dtype,
        max_model_len=max_model_len,
        enforce_eager=True,
        # a mean over the prompt needs every row of it
        enable_prefix_caching=False,
        seed=0,
    )


def record_pathways(llm: Any, prompts: Sequence[list[int]]) -> Recorded:
    """Return the pathways and hidden states of prompts under the model's own routing.

    Args:
        llm: vLLM's offline engine, with the plugin and `enforce_eager`.
        prompts: Token ids.

    Raises:
        StoreError: the engine cannot be listened to.
    """
    shape = _shape(llm)
    if not llm.llm_engine.model_config.enforce_eager:
        raise StoreError("pathways are recorded with enforce_eager only")
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
    llm.collective_rpc("moe_tta_record", args=(True,))
    try:
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(inputs, params, use_tqdm=False)
        taken = llm.collective_rpc("moe_tta_take_pathways")[0]
    finally:
        llm.collective_rpc("moe_tta_record", args=(False,))
    # vLLM puts a suffix behind the ids it gives out
    by_id = {name.rsplit("-", 1)[0]: kept for name, kept in taken.items()}
    kept = [by_id[output.request_id] for output in outputs]

    def stacked(name: str) -> np.ndarray:
        return np.stack([np.frombuffer(item[name], np.float32) for item in kept])

    size = (len(prompts), len(shape.layers), shape.num_experts)
    return Recorded(
        stacked("pathway").reshape(size),
        stacked("hidden_last"),
        stacked("hidden_mean"),
    )


def _shape(llm: Any) -> Any:
    admission = getattr(llm.llm_engine.input_processor, "moe_tta", None)
    if admission is None:
        raise StoreError("vLLM did not load the plugin; see moe-tta doctor")
    if admission.shape is None:
        raise StoreError("this model has no MoE layers")
    if not admission.shape.is_distribution:
        raise StoreError(
            "remix needs a softmax router without correction bias; this model scores "
            f"with {admission.shape.scoring}"
        )
    return admission.shape


class ReferenceEngine:
    """Judges and records reference questions.

    Args:
        llm: vLLM's offline engine.
        score: How choices are compared.
    """

    def __init__(self, llm: Any, score: Score):
        self.llm = llm
        self.score = score
        self._shape = _shape(llm)
        self._tokenizer = llm.get_tokenizer()
        self._limit = llm.llm_engine.model_config.max_model_len - 1

    @cached_property
    def model(self) -> ModelCard:
        """The model whose pathways are recorded."""
        return model_card(self.llm.llm_engine.vllm_config, self._shape)

    def judge(self, questions: Sequence[Question]) -> list[Verdict]:
        """Say of each question whether the model answers it rightly."""
        verdicts = ["wrong"] * len(questions)
        jobs = [self._prompts(question) for question in questions]
        for place, prompts in enumerate(jobs):
            room = ANSWER_TOKENS if questions[place].answers else 0
            if max(map(len, prompts)) + room > self._limit:
                verdicts[place] = "too_long"
        todo = [i for i, verdict in enumerate(verdicts) if verdict != "too_long"]
        for wanted, answer in ((True, self._choose), (False, self._generate)):
            places = [i for i in todo if bool(questions[i].choices) == wanted]
            if places:
                right = answer(
                    [questions[i] for i in places], [jobs[i] for i in places]
                )
                for place, is_it in zip(places, right, strict=True):
                    verdicts[place] = "right" if is_it else "wrong"
        return verdicts

    def record(self, questions: Sequence[Question]) -> Recorded:
        """Record questions' pathways and hidden states."""
        return record_pathways(self.llm, [self._encode(q.prompt) for q in questions])

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def _prompts(self, question: Question) -> list[list[int]]:
        """Return the token ids to read: one for each choice, or the prompt."""
        texts = [f"{question.prompt} {choice}" for choice in question.choices]
        return [self._encode(text) for text in texts or [question.prompt]]

    def _choose(
        self, questions: list[Question], prompts: list[list[list[int]]]
    ) -> list[bool]:
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False
        )
        inputs = [{"prompt_token_ids": ids} for job in prompts for ids in job]
        outputs = iter(self.llm.generate(inputs, params, use_tqdm=False))
        right = []
        for question, job in zip(questions, prompts, strict=True):
            start = len(self._encode(question.prompt))
            sums = [
                _log_likelihood(next(outputs).prompt_logprobs, ids, start)
                for ids in job
            ]
            right.append(chosen(sums, question.choices, self.score) == question.gold)
        return right

    def _generate(
        self, questions: list[Question], prompts: list[list[list[int]]]
    ) -> list[bool]:
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0)
        inputs = [{"prompt_token_ids": ids} for (ids,) in prompts]
        outputs = self.llm.generate(inputs, params, use_tqdm=False)
        return [
            is_right(output.outputs[0].text, question.answers)
            for output, question in zip(outputs, questions, strict=True)
        ]


def _log_likelihood(prompt_logprobs: list[Any], ids: list[int], start: int) -> float:
    """Sum the log-likelihood of the tokens from `start` on, in nats."""
    return sum(prompt_logprobs[i][ids[i]].logprob for i in range(start, len(ids)))
