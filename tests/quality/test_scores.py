# SPDX-License-Identifier: Apache-2.0
"""Log-likelihoods: packed = separate, combined = the rule, vLLM = transformers.

Tolerances are derived: in float32 vLLM may be at most twice as far from float64 as
transformers is, plus the rounding of float32 logits of up to 16, through the contrast's
factor 1 + 2 beta, once for each answer token.
"""

from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.lab.scoring import answer_scores
from benchmarks.overhead.models import Model
from benchmarks.quality import arms
from benchmarks.quality.arms import Arm
from benchmarks.quality.choices import likeliest
from benchmarks.quality.engine import Engine, sampling_params
from benchmarks.quality.packing import Encoded
from benchmarks.quality.prompt_scores import PromptScores
from benchmarks.quality.tasks.question import ChoiceQuestion
from benchmarks.quality.teacher_forced import TeacherForced
from moe_tta.kernels.contrast import IMPLAUSIBLE, contrast_logits
from moe_tta.replica import routed

QUESTIONS = [
    ChoiceQuestion("0", ("What is red?",) * 3, ("a rose", "an old sea", "I"), 0),
    ChoiceQuestion("1", ("Tom saw Ann so Tom", "Tom saw Ann so Ann"), ("ran.",) * 2, 1),
    ChoiceQuestion("2", ("Is it so?\nAnswer:",) * 2, ("no", "yes"), 1),
]
FORCED = arms.contrast([{"rank": 2}, {"k": 1}], [0.0, 0.7], [0.0, 0.1])
ONE_STREAM = [arms.PLAIN, *arms.fixed_k([1, 3]), *arms.top_p([0.5])]
ROUNDING = 16 * torch.finfo(torch.float32).eps


def shape_of(folder, k_max=4):
    return replace(Model.find(str(folder)).shape, k_max=k_max)


def scores(folder, dtype, questions=QUESTIONS, chosen=(*ONE_STREAM, *FORCED)):
    """Return {(question, arm name): log-likelihoods}."""
    scorer = TeacherForced(folder, shape_of(folder), chosen, dtype)
    return {
        (questions[i].id, arm.name): torch.tensor(values, dtype=torch.float64)
        for i, by_arm in scorer.score(questions, chosen)
        for arm, values in by_arm.items()
    }


def num_answer_bytes(question):
    return torch.tensor([len(choice) + 1 for choice in question.choices])


@pytest.fixture(scope="module")
def exact(byte_model):
    return scores(byte_model, "float64")


def test_packed_scores_are_those_of_separate_texts(byte_model, exact):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(byte_model / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(
        byte_model, dtype=torch.float64, experts_implementation="eager"
    )
    for question in QUESTIONS:
        pairs = list(zip(question.contexts, question.choices, strict=True))
        separate = torch.from_numpy(answer_scores(model, tokenizer, pairs))
        bound = ROUNDING * num_answer_bytes(question)
        assert ((exact[question.id, "plain"] - separate).abs() <= bound).all()


@pytest.mark.parametrize("arm", FORCED, ids=lambda arm: arm.name)
def test_a_contrast_is_the_rule_on_two_whole_passes(byte_model, exact, arm):
    shape = shape_of(byte_model)
    model = AutoModelForCausalLM.from_pretrained(
        byte_model, dtype=torch.float64, experts_implementation="eager"
    )
    question = QUESTIONS[0]
    context, choice = question.contexts[1], question.choices[1]
    scorer = TeacherForced(byte_model, shape, [arm], "float64")
    text = scorer.tokenizer.encode(f"{context} {choice}").ids
    compiled = arm.compiled(shape)
    rows = []
    for plans in (compiled.plans, compiled.pair.weak.plans):
        with torch.inference_mode(), routed(model, shape, plans, len(text)):
            rows.append(model(torch.tensor([text])).logits[0, len(context) - 1 : -1])
    combined = contrast_logits(*rows, *compiled.pair.numbers).double()
    log_probs = combined.log_softmax(-1)
    expected = log_probs[torch.arange(len(rows[0])), text[len(context) :]].sum()
    found = exact["0", arm.name][1]
    beta, alpha = compiled.pair.numbers
    # of an implausible token the offset is rounded, too
    largest = 16 + (IMPLAUSIBLE if alpha else 0)
    rounding = (1 + 2 * beta) * largest * torch.finfo(torch.float32).eps
    assert abs(found - expected) <= rounding * len(rows[0])


@pytest.mark.parametrize("weak", ["rank=2", "k=1"])
def test_no_strength_and_no_threshold_is_the_model(exact, weak):
    for question in QUESTIONS:
        found = exact[question.id, f"contrast {weak} beta=0.0 alpha=0.0"]
        assert torch.equal(found, exact[question.id, "plain"])


def test_arms_differ(exact):
    values = {name: tuple(v.tolist()) for (i, name), v in exact.items() if i == "0"}
    without = [values[name] for name in values if "beta=0.0" not in name]
    assert len(set(without)) == len(without) == 8


def test_a_routing_that_depends_on_the_place_is_refused(byte_model):
    request = {"dynamic_k": {"k": 1, "span": "prompt"}}
    with pytest.raises(ValueError, match="span 'all'"):
        TeacherForced(
            byte_model, shape_of(byte_model), [Arm("p", "", request)], "float32"
        )


@pytest.fixture(scope="module")
def engine(byte_model):
    args = Namespace(
        model=byte_model,
        dtype="float32",
        max_model_len=256,
        max_num_seqs=16,
        kv_gib=0.25,
        gpu_memory_utilization=0.9,
        eager=True,
        moe_backend="auto",
        seed=0,
    )
    with Engine(args, shape_of(byte_model)) as engine:
        yield engine


def test_vllm_scores_like_transformers(byte_model, exact, engine):
    own = scores(byte_model, "float32", chosen=ONE_STREAM)
    found = dict(PromptScores(engine).score(QUESTIONS, ONE_STREAM))
    for place, question in enumerate(QUESTIONS):
        for arm in ONE_STREAM:
            true = exact[question.id, arm.name]
            error = (torch.tensor(found[place][arm], dtype=torch.float64) - true).abs()
            own_error = (own[question.id, arm.name] - true).abs().max()
            bound = 2 * own_error + ROUNDING * num_answer_bytes(question)
            assert (error <= bound).all()


def test_vllm_s_contrast_scores_like_transformers(byte_model, engine):
    """What the engine says of its own greedy text is what the scorer says of it."""
    arm = Arm("c", "", FORCED[-1].request)
    prompts = [list(b"abcdefgh"), list(b"The end of it")]
    params = sampling_params(
        arm, max_tokens=8, temperature=0, logprobs=0, ignore_eos=True
    )
    asked = [({"prompt_token_ids": prompt}, params) for prompt in prompts]
    shape = shape_of(byte_model)
    exact, own = (
        TeacherForced(byte_model, shape, [arm], dtype)
        for dtype in ("float64", "float32")
    )
    for index, output in engine.run(asked):
        done = output.outputs[0]
        steps = zip(done.token_ids, done.logprobs, strict=True)
        served = sum(step[token].logprob for token, step in steps)
        text = Encoded(((*prompts[index], *done.token_ids),), (len(prompts[index]),))
        (true,) = exact.score_pack([text], [arm])[arm]
        (rough,) = own.score_pack([text], [arm])[arm]
        assert true > -1000  # every token was plausible
        bound = 2 * abs(rough - true) + (1 + 2 * 0.7) * ROUNDING * 8
        assert abs(served - true) <= bound


def test_likeliest_by_hand():
    question = ChoiceQuestion("0", ("",) * 3, ("ab", "abcd", "x"), 0)
    assert likeliest(question, [-4.0, -6.0, -5.0], "raw") == 0
    assert likeliest(question, [-4.0, -6.0, -5.0], "per_char") == 1
    assert likeliest(question, [-1.0, -1.0, -1.0], "raw") == 0  # the first of equals
