# SPDX-License-Identifier: Apache-2.0
"""Scores under given distributions are vLLM's, the replica's and the plain model's.

Tolerances are those of test_scores.py: in float32 vLLM may be at most twice as far from
float64 as the adapter is, plus the rounding of float32 logits once for each answer
token; and an answer's sum is its mean times its length, two roundings of float32.
"""

from argparse import Namespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from benchmarks.quality.arms import Arm
from benchmarks.quality.choices import likeliest
from benchmarks.quality.packing import encode
from benchmarks.quality.remix.likelihoods import (
    OverriddenQuestions,
    log_likelihoods_from_last_prompt_token,
    plain_log_likelihoods,
    prompt_of,
)
from benchmarks.quality.remix.references import AdapterEngine
from benchmarks.quality.tasks.question import ChoiceQuestion
from moe_tta.adapter import AdapterModel, last_row_routing
from moe_tta.remix.offline import as_request
from moe_tta.remix.questions import Question
from moe_tta.replica import routed
from tests.plugin.engine import engine, sampling
from tests.quality.test_scores import (
    QUESTIONS,
    ROUNDING,
    num_answer_bytes,
    shape_of,
)

ASKED = [QUESTIONS[0], QUESTIONS[2]]  # one prompt for all choices
LAYERS = (2, 3)
WORDS = ("ice", "salt", "rain", "moss", "wolf", "iron", "leaf", "wind", "clay", "star")


@pytest.fixture(scope="module")
def tokenizer(byte_model):
    return Tokenizer.from_file(str(byte_model / "tokenizer.json"))


@pytest.fixture(scope="module")
def models(byte_model):
    return {
        dtype: AdapterModel.from_checkpoint(byte_model, dtype)
        for dtype in (torch.float32, torch.float64)
    }


def overridden(model, tokenizer, omega):
    questions = [encode(tokenizer, question) for question in ASKED]
    scores = OverriddenQuestions(model, questions, LAYERS).log_likelihoods(omega)
    return [torch.tensor(values, dtype=torch.float64) for values in scores]


def bound_of(true, own, question):
    """What float32 may be off by, for each choice."""
    eps = torch.finfo(torch.float32).eps
    error = (own - true).abs().max()
    return 2 * error + ROUNDING * num_answer_bytes(question) + 2 * eps * true.abs()


@pytest.fixture(scope="module")
def given():
    """Distributions [2, layers, E] for the questions' last prompt tokens."""
    rows = np.random.default_rng(5).dirichlet(np.ones(8), (len(ASKED), len(LAYERS)))
    return rows.astype(np.float32)


def test_vllm_serves_the_same_scores(byte_model, models, tokenizer, given):
    """The request member `distribution` at the question's end, answer in the prompt."""
    omega = torch.from_numpy(given)
    own = overridden(models[torch.float32], tokenizer, omega)
    exact = overridden(models[torch.float64], tokenizer, omega)
    keys, prompts, params = [], [], []
    for place, question in enumerate(ASKED):
        text = encode(tokenizer, question)
        for choice, sequence in enumerate(text.sequences):
            start = text.starts[choice]
            request = as_request(LAYERS, given[place])
            wanted = {"remix": request, "prompt_tokens": start}
            keys.append((place, choice, start))
            prompts.append({"prompt_token_ids": list(sequence)})
            params.append(sampling(1, wanted, prompt_logprobs=0))
    served = [torch.zeros_like(values) for values in exact]
    options = {"dtype": "float32", "max_model_len": 128}
    settings = {"moe_tta": {"allow_inline": True}}
    with engine(str(byte_model), additional_config=settings, **options) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    for (place, choice, start), output in zip(keys, outputs, strict=True):
        steps = zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
        answer = list(steps)[start:]
        served[place][choice] = sum(step[token].logprob for token, step in answer)
    plain = overridden(
        models[torch.float64], tokenizer, own_routing(models[torch.float64], tokenizer)
    )
    for place, question in enumerate(ASKED):
        bound = bound_of(exact[place], own[place], question)
        assert ((served[place] - exact[place]).abs() <= bound).all()
        assert ((plain[place] - exact[place]).abs() > 100 * bound).all()


def own_routing(model, tokenizer):
    prompts = [prompt_of(encode(tokenizer, question)) for question in ASKED]
    return last_row_routing(model, prompts)[:, list(LAYERS)]


def test_own_routing_scores_as_no_override(models, tokenizer):
    model = models[torch.float64]
    overriding = overridden(model, tokenizer, own_routing(model, tokenizer))
    questions = [encode(tokenizer, question) for question in ASKED]
    packed = plain_log_likelihoods(model, questions)
    for question, ours, plain in zip(ASKED, overriding, packed, strict=True):
        # distributions pass as float32, and so do the experts' weights
        bound = ROUNDING * num_answer_bytes(question)
        assert ((ours - torch.tensor(plain).double()).abs() <= bound).all()


def test_generated_tokens_are_overridden_as_plans_say(
    byte_model, models, tokenizer, given
):
    """The replica with the request's span is the reference, in float64."""
    model, omega = models[torch.float64], torch.from_numpy(given)
    texts = [encode(tokenizer, question) for question in ASKED]
    found = log_likelihoods_from_last_prompt_token(model, texts, LAYERS, omega)
    once = overridden(model, tokenizer, omega)
    whole = AutoModelForCausalLM.from_pretrained(
        byte_model, dtype=torch.float64, experts_implementation="eager"
    )
    shape = shape_of(byte_model)
    for place, question in enumerate(ASKED):
        member = as_request(LAYERS, given[place]) | {"span": "last_prompt+generated"}
        plans = Arm("", "", {"remix": member}).compiled(shape).plans
        starts, wanted = texts[place].starts, []
        for sequence, start in zip(texts[place].sequences, starts, strict=True):
            with torch.inference_mode(), routed(whole, shape, plans, start):
                logits = whole(torch.tensor([sequence])).logits[0, start - 1 : -1]
            targets = torch.tensor(sequence[start:])[:, None]
            wanted.append(logits.log_softmax(-1).gather(1, targets).sum())
        # distributions and weights of experts pass as float32
        bound = ROUNDING * num_answer_bytes(question)
        scores = torch.tensor(found[place], dtype=torch.float64)
        assert ((scores - torch.stack(wanted)).abs() <= bound).all()
        assert ((scores - once[place]).abs() > 100 * bound).all()


def test_a_context_for_each_choice_is_refused(tokenizer):
    with pytest.raises(ValueError, match="one prompt for all choices"):
        prompt_of(encode(tokenizer, QUESTIONS[1]))


def test_references_are_judged_by_likelihood_and_recorded_one_by_one(models, tokenizer):
    model = models[torch.float32]
    card = Namespace(moe_layers=list(model.shape.layers), num_experts=8)
    asked = [
        Question(prompt=f"Is {a} {b}?", choices=("no", "yes", "so"), gold=number % 3)
        for number, (a, b) in enumerate(zip(WORDS, WORDS[3:], strict=False))
    ]
    reader = AdapterEngine(model, tokenizer, card, "raw")
    verdicts = reader.judge(asked)
    assert set(verdicts) == {"right", "wrong"}
    for question, verdict in zip(asked, verdicts, strict=True):
        alike = (question.prompt,) * 3
        one = ChoiceQuestion("", alike, question.choices, question.gold)
        (scores,) = plain_log_likelihoods(model, [encode(tokenizer, one)])
        right = likeliest(one, scores, "raw") == one.gold
        assert verdict == ("right" if right else "wrong")
    found = reader.record(asked).pathways
    for question, pathway in zip(asked, found, strict=True):
        ids = tokenizer.encode(question.prompt).ids
        alone = last_row_routing(model, [ids])[0].numpy()
        # other padding, other order of float32 sums of logits up to 16
        np.testing.assert_allclose(pathway, alone, atol=ROUNDING)
