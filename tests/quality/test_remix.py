# SPDX-License-Identifier: Apache-2.0
"""remix on multiple choice: its scores are vLLM's, its arms are what they say.

Tolerances are those of test_scores.py: in float32 vLLM may be at most twice as far from
float64 as the adapter is, plus the rounding of float32 logits once for each answer
token; and an answer's sum is its mean times its length, two roundings of float32.
"""

from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from benchmarks.quality.__main__ import main, parser
from benchmarks.quality.arms import Arm
from benchmarks.quality.choices import likeliest
from benchmarks.quality.commands.remix import check_options
from benchmarks.quality.packing import encode
from benchmarks.quality.remix import methods as remix_methods
from benchmarks.quality.remix import updates
from benchmarks.quality.remix.batch import Batch
from benchmarks.quality.remix.likelihoods import (
    OverriddenQuestions,
    log_likelihoods_from_last_prompt_token,
    plain_log_likelihoods,
    prompt_of,
)
from benchmarks.quality.remix.methods import all_methods
from benchmarks.quality.remix.nearness import nearness
from benchmarks.quality.remix.references import AdapterEngine, without_passage
from benchmarks.quality.remix.scorer import RemixScorer
from benchmarks.quality.remix.sets import SETS
from benchmarks.quality.remix.study import open_study
from benchmarks.quality.remix.variants import variants
from benchmarks.quality.report import read_results
from benchmarks.quality.tasks import TASKS, load
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
from tests.quality.test_tasks import olmes_request, write_requests

ASKED = [QUESTIONS[0], QUESTIONS[2]]  # one prompt for all choices
LAYERS = (2, 3)
NAMES = (
    "plain",
    "in context",
    "regression alpha=0",
    "regression alpha searched",
    "mode finding",
    "NGD",
    "random references regression",
    "oracle",
    "NGD lr=10.0",
    "random references NGD lr=10.0",
    "oracle lr=10.0",
)
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


def made_questions(word, count, first=0):
    """Two choices; which one is right changes, so that some are answered right."""
    requests = []
    for number in range(first, first + count):
        a, b = WORDS[number % 10], WORDS[(number // 10 + number) % 10]
        context = f"Question: {word} {a} {number} {b}?\nAnswer:"
        requests += [
            olmes_request(number, i, choice, context, gold=number % 2)
            for i, choice in enumerate((a, b + "s"))
        ]
    return requests


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, part in SETS.items():
        write_requests(folder / part.files, made_questions(name, 16))
    write_requests(folder / TASKS["arc_easy"].test.files, made_questions("arc", 5))
    write_requests(folder / TASKS["arc_easy"].tune.files, made_questions("cra", 4))
    return folder


def command(byte_model, data, work, out):
    return (
        f"quality remix --model {byte_model} --data {data} --task arc_easy --test 4 "
        f"--tune 3 --neighbours --more-rates 10 --dtype float32 --k 2 --layers 2 "
        f"--steps 3 --work {work} --out {out}"
    ).split()


@pytest.fixture(scope="module")
def study(byte_model, data, tmp_path_factory):
    work = tmp_path_factory.mktemp("work")
    args = parser().parse_args(command(byte_model, data, work, work / "out")[1:])
    return open_study(args, TASKS["arc_easy"])


@pytest.fixture(scope="module")
def batch(study, data):
    task = TASKS["arc_easy"]
    return Batch(study, load(task, task.test, data, 0, None, 0)[0])


def test_a_passage_is_no_part_of_a_reference():
    asked = "Question: why?\nAnswer:"
    assert without_passage(f"A passage.\n{asked}") == asked == without_passage(asked)


def test_references_are_the_other_sets_right_answers(study):
    counts = study.store.card.counts
    assert counts.questions == 32
    assert counts.kept == len(study.store) >= 4
    texts = [study.store.question(row).prompt for row in range(len(study.store))]
    assert all("openbookqa" in text or "sciq" in text for text in texts)
    assert study.store.card.layers == [0, 1, 2, 3]


def test_updates_are_what_they_say(batch, study):
    arms = {arm.name: arm for arm in all_methods(8, 3, 1e-2, [10.0])}
    assert tuple(arms) == NAMES
    store = study.store
    for place, question in enumerate(batch.questions):
        vector = study.embedder.embed(question.contexts[0])
        vector = vector / np.linalg.norm(vector)
        near = store.embeddings(np.arange(len(store))) @ vector
        near[near > 0.95] = -2
        rows = np.argsort(-near)[:2]
        borrowed = batch.nearest.borrowed[place]
        assert sorted(borrowed.rows.tolist()) == sorted(rows.tolist())
        apart = 2 - 2 * near[borrowed.rows]
        weights = np.exp(-apart / (2 * np.median(np.sqrt(apart)) ** 2))
        weights /= weights.sum()
        mean = np.einsum(
            "k,kle->le", weights, store.pathways(borrowed.rows, list(LAYERS))
        )
        # alone and in a batch: other rounding of float32 embeddings
        np.testing.assert_allclose(batch.nearest.mean[place], mean, atol=1e-5)
    drawn = [one.rows.tolist() for one in batch.random.borrowed]
    again = [one.rows.tolist() for one in Batch(study, batch.questions).random.borrowed]
    assert drawn == again
    assert len(set(map(tuple, drawn))) > 1


def test_searches_lower_the_loss_they_search(batch):
    with torch.no_grad():
        own = batch.nearest.tail.loss(batch.own)
        searched = batch.nearest.tail.loss(updates.searched(batch))
        gold = batch.labels.loss(batch.own)
    assert (searched <= own).all()
    methods = all_methods(8, 3, 1e-2, [10.0])
    scores = {arm.name: f(batch) for arm, f in methods.items()}
    for place, question in enumerate(batch.questions):
        answer = question.gold
        size = len(question.choices[answer]) + 1
        plain, oracle = (scores[n][place][answer] for n in ("plain", "oracle"))
        assert abs(plain / size + gold[place]) <= ROUNDING
        assert oracle > plain
    values = [tuple(map(tuple, scores[name])) for name in NAMES]
    assert len(set(values)) == len(NAMES)


def test_one_setting_at_a_time_is_changed(batch, study):
    """What is left as published scores the same; what is changed, by hand."""
    published = {arm.name: f(batch) for arm, f in all_methods(8, 3, 1e-2).items()}
    found = {arm.name: f(batch) for arm, f in variants(study, 3, 1e-2).items()}
    assert found["plain"] == published["plain"]
    assert found["regression"] == published["regression alpha=0"]
    assert found["NGD"] == published["NGD"] == found["NGD steps=3"]
    assert found["oracle"] == published["oracle"] == found["oracle steps=3"]
    half = (batch.own + batch.nearest.mean) / 2
    assert found["regression alpha=0.5"] == batch.choices.log_likelihoods(half)
    nearest = torch.stack(
        [torch.from_numpy(one.pathways[0]) for one in batch.nearest.borrowed]
    )
    assert found["regression k=1"] == batch.choices.log_likelihoods(nearest)
    last = OverriddenQuestions(study.model, batch.encoded, LAYERS[1:])
    mean = batch.nearest.mean[:, 1:]
    assert found["regression layers=1"] == last.log_likelihoods(mean)
    unlike = [name for name in found if not name.endswith("steps=3")]
    scores = {name: tuple(map(tuple, found[name])) for name in unlike}
    # unit embeddings: the inner product is the cosine
    assert scores.pop("regression kernel=linear") == scores["regression kernel=cosine"]
    assert len(set(scores.values())) == len(scores)


def test_nearness_by_hand(batch, study):
    found = list(nearness(batch))
    assert len(found) == len(batch.questions)
    for place, question in enumerate(batch.questions):
        one, rows = found[place], batch.nearest.borrowed[place].rows
        vector = study.embedder.embed(question.contexts[0])
        vector = vector / np.linalg.norm(vector)
        near = study.store.embeddings(rows) @ vector
        # alone and in a batch: other rounding of float32 embeddings
        assert abs(one.similarity - near.max()) <= 1e-5
        labels = [study.store.question(int(row)).label for row in rows]
        same = [label == question.choices[question.gold] for label in labels]
        assert one.same_answer == sum(same) / 2
        own, mean = batch.own[place], batch.nearest.mean[place]
        moved, kept = 0.0, 0
        for layer in range(2):
            moved += float((own[layer] - mean[layer]).clamp_min(0).sum()) / 2
            best = set(own[layer].argsort(descending=True)[:2].tolist())
            kept += len(best & set(mean[layer].argsort(descending=True)[:2].tolist()))
        assert abs(one.moved - moved) <= 1e-6
        assert one.kept == kept / 4
        assert one.moved_random != one.moved


def test_the_core_is_an_arm_where_it_is_smaller():
    extra = {arm.name for arm in all_methods(64, 10, 1e-2)} - set(NAMES)
    assert extra == {"NGD core=20"}


def test_in_context_by_hand(batch, tokenizer):
    found = remix_methods.in_context(batch)
    question, solved = batch.questions[0], batch.nearest.questions[0]
    assert len(solved) == 2
    head = "".join(
        f"{one.prompt} {one.choices[one.gold]}\n\n" for one in (solved[1], solved[0])
    )
    contexts = (head + question.contexts[0],) * 2
    whole = ChoiceQuestion("", contexts, question.choices, 0)
    (wanted,) = plain_log_likelihoods(batch.study.model, [encode(tokenizer, whole)])
    # packed with other questions
    apart = (torch.tensor(found[0]) - torch.tensor(wanted)).abs()
    assert (apart <= ROUNDING * num_answer_bytes(question)).all()


def test_too_few_references_are_named(batch, study):
    many = replace(study, look_up=replace(study.look_up, k=len(study.store) + 1))
    with pytest.raises(ValueError, match="references for every question, the store"):
        _ = Batch(many, batch.questions).nearest


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("k", 0, "from 1 to 64, got 0"),
        ("layers", 5, "from 1 to 4, got 5"),
        ("steps", 0, "from 1 to 1000, got 0"),
        ("lr", 0.0, "above 0, got 0.0"),
        ("lr", float("nan"), "above 0, got nan"),
        ("more_rates", [1.0, -1.0], "above 0, got -1.0"),
    ],
)
def test_numbers_are_checked(name, value, wanted):
    right = {"k": 3, "layers": 2, "steps": 1, "lr": 0.1, "more_rates": [1.0]}
    args = Namespace(**right | {name: value})
    with pytest.raises(ValueError, match=f"expected .* {wanted}"):
        check_options(args, 4)


def test_the_command(byte_model, data, tmp_path, monkeypatch, capsys):
    out, work = tmp_path / "out.json", tmp_path / "work"
    monkeypatch.setattr("sys.argv", command(byte_model, data, work, out))
    assert main() == 0
    (result,) = read_results([out])
    tested = {arm["name"]: arm for arm in result["test"]["arms"]}
    assert tuple(tested) == NAMES
    assert all(arm["n"] == 4 == len(arm["right"]) for arm in tested.values())
    assert result["store"]["counts"]["questions"] == 32
    nats = (tested[name]["gold_nats"] for name in ("oracle", "plain"))
    assert all(oracle > plain for oracle, plain in zip(*nats, strict=True))
    assert len(result["neighbours"]["similarities"]) == 4
    varied = [arm["name"] for arm in result["tune"]["arms"]]
    assert len(varied) == len(set(varied)) == 31
    assert all(arm["n"] == 3 for arm in result["tune"]["arms"])
    assert str(tmp_path) not in out.read_text()
    assert capsys.readouterr().out.count("| arc_easy |") == len(NAMES)

    # everything is there: the same result without a score
    monkeypatch.setattr(RemixScorer, "score", None)
    assert main() == 0
    (again,) = read_results([out])
    assert again["test"] == result["test"]
    assert again["tune"] == result["tune"]

    # other references do not mix with these
    monkeypatch.setattr("sys.argv", [*command(byte_model, data, work, out), "--k=1"])
    assert main() == 1
    assert "k differ" in capsys.readouterr().err
    fewer = [*command(byte_model, data, work, out), "--references=5"]
    monkeypatch.setattr("sys.argv", fewer)
    assert main() == 1
    assert "holds other references" in capsys.readouterr().err
