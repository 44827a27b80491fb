# SPDX-License-Identifier: Apache-2.0
"""The arms of remix are what they say, and so is what is reported of them.

Tolerances are those of test_remix_scores.py.
"""

from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from benchmarks.quality.__main__ import main, parser
from benchmarks.quality.commands.remix import check_options
from benchmarks.quality.packing import encode
from benchmarks.quality.remix import methods as remix_methods
from benchmarks.quality.remix import updates
from benchmarks.quality.remix.batch import Batch
from benchmarks.quality.remix.likelihoods import (
    OverriddenQuestions,
    plain_log_likelihoods,
)
from benchmarks.quality.remix.methods import all_methods
from benchmarks.quality.remix.nearness import nearness
from benchmarks.quality.remix.references import without_passage
from benchmarks.quality.remix.scorer import RemixScorer
from benchmarks.quality.remix.sets import SETS
from benchmarks.quality.remix.study import open_study
from benchmarks.quality.remix.variants import variants
from benchmarks.quality.report import read_results
from benchmarks.quality.tasks import TASKS, load
from benchmarks.quality.tasks.question import ChoiceQuestion
from tests.quality.test_remix_scores import LAYERS, WORDS
from tests.quality.test_scores import (
    ROUNDING,
    num_answer_bytes,
)
from tests.quality.test_tasks import olmes_request, write_requests

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


@pytest.fixture(scope="module")
def tokenizer(byte_model):
    return Tokenizer.from_file(str(byte_model / "tokenizer.json"))


def made_questions(word, count, first=0, passage=""):
    """Two choices; which one is right changes, so that some are answered right."""
    requests = []
    for number in range(first, first + count):
        a, b = WORDS[number % 10], WORDS[(number // 10 + number) % 10]
        context = f"{passage}Question: {word} {a} {number} {b}?\nAnswer:"
        requests += [
            olmes_request(number, i, choice, context, gold=number % 2)
            for i, choice in enumerate((a, b + "s"))
        ]
    return requests


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, part in SETS.items():
        passage = "A passage.\n" if name in ("sciq", "boolq") else ""
        made = made_questions(name, 16, passage=passage)
        write_requests(folder / part.files, made)
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_named(byte_model, data, tmp_path):
    words = [*command(byte_model, data, tmp_path, tmp_path)[1:], "--device", "cuda"]
    with pytest.raises(ValueError, match="--device cuda: PyTorch finds no CUDA device"):
        open_study(parser().parse_args(words), TASKS["arc_easy"])


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
    assert len(varied) == len(set(varied)) == 33
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
