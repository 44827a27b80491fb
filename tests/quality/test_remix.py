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

from benchmarks.quality.__main__ import main, parser
from benchmarks.quality.choices import likeliest
from benchmarks.quality.commands.remix import check_options
from benchmarks.quality.packing import encode
from benchmarks.quality.remix import methods as remix_methods
from benchmarks.quality.remix.batch import Batch
from benchmarks.quality.remix.likelihoods import (
    OverriddenQuestions,
    plain_log_likelihoods,
    prompt_of,
)
from benchmarks.quality.remix.methods import all_methods
from benchmarks.quality.remix.references import AdapterEngine, without_passage
from benchmarks.quality.remix.scorer import RemixScorer
from benchmarks.quality.remix.sets import SETS
from benchmarks.quality.remix.study import open_study
from benchmarks.quality.report import read_results
from benchmarks.quality.tasks import TASKS, load
from benchmarks.quality.tasks.question import ChoiceQuestion
from moe_tta.adapter import AdapterModel, last_row_routing
from moe_tta.remix.offline import as_request
from moe_tta.remix.questions import Question
from tests.plugin.engine import engine, sampling
from tests.quality.test_scores import QUESTIONS, ROUNDING, num_answer_bytes
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
    "random references NGD",
    "oracle",
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
    return folder


def command(byte_model, data, work, out):
    return (
        f"quality remix --model {byte_model} --data {data} --task arc_easy --test 4 "
        f"--dtype float32 --k 2 --layers 2 --steps 3 --work {work} --out {out}"
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
    arms = {arm.name: arm for arm in all_methods(8, 3, 1e-2)}
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
        searched = batch.nearest.tail.loss(remix_methods._searched(batch))
        gold = batch.labels.loss(batch.own)
    assert (searched <= own).all()
    scores = {arm.name: f(batch) for arm, f in all_methods(8, 3, 1e-2).items()}
    for place, question in enumerate(batch.questions):
        answer = question.gold
        size = len(question.choices[answer]) + 1
        plain, oracle = (scores[n][place][answer] for n in ("plain", "oracle"))
        assert abs(plain / size + gold[place]) <= ROUNDING
        assert oracle > plain
    values = [tuple(map(tuple, scores[name])) for name in NAMES]
    assert len(set(values)) == len(NAMES)


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
    assert found[0] == wanted


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
    ],
)
def test_numbers_are_checked(name, value, wanted):
    args = Namespace(**{"k": 3, "layers": 2, "steps": 1, "lr": 0.1, name: value})
    with pytest.raises(ValueError, match=f"expected --{name} {wanted}"):
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
    oracle, plain = tested["oracle"], tested["plain"]
    assert oracle["gold_log_likelihood"] > plain["gold_log_likelihood"]
    assert str(tmp_path) not in out.read_text()
    assert capsys.readouterr().out.count("| arc_easy |") == len(NAMES)

    # everything is there: the same result without a score
    monkeypatch.setattr(RemixScorer, "score", None)
    assert main() == 0
    (again,) = read_results([out])
    assert again["test"] == result["test"]

    # other references do not mix with these
    monkeypatch.setattr("sys.argv", [*command(byte_model, data, work, out), "--k=1"])
    assert main() == 1
    assert "k differ" in capsys.readouterr().err
    fewer = [*command(byte_model, data, work, out), "--references=5"]
    monkeypatch.setattr("sys.argv", fewer)
    assert main() == 1
    assert "holds other references" in capsys.readouterr().err
