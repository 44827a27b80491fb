# SPDX-License-Identifier: Apache-2.0

import gzip
import json
from itertools import chain

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from benchmarks.lab import data, scoring
from benchmarks.lab.routing import reroute, routed
from benchmarks.lab.tasks import Question, load_questions
from benchmarks.lab.train import batches, schedule
from moe_tta.lab.architectures import QWEN2_MOE

from .conftest import TINY

TOKENS = torch.arange(60).view(2, 30)


def amplified(model):
    for parameter in model.parameters():
        parameter.data *= 5  # so that routing changes the output
    return model.eval()


@pytest.fixture
def mixtral():
    torch.manual_seed(0)
    config = MixtralConfig(**TINY, num_local_experts=8, num_experts_per_tok=2)
    return amplified(MixtralForCausalLM(config))


@pytest.fixture
def qwen2_moe():
    torch.manual_seed(0)
    config = Qwen2MoeConfig(**QWEN2_MOE.config_json(TINY, 8, 2))
    return amplified(Qwen2MoeForCausalLM(config))


@pytest.fixture(params=["mixtral", "qwen2_moe"])
def moe(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def words():
    vocabulary = {f"w{i}": i for i in range(62)} | {"<|endoftext|>": 62, "[UNK]": 63}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


@torch.inference_mode()
def test_learned_routing_at_the_trained_k_changes_nothing(moe):
    expected = moe(TOKENS).logits
    with routed(moe, "learned", 2) as load:
        found = moe(TOKENS).logits
    torch.testing.assert_close(found, expected)
    assert load.sum(1).tolist() == [TOKENS.numel() * 2] * 2


@pytest.mark.parametrize(
    ("routing", "k"), [("random", 2), ("inverted", 2), ("learned", 4)]
)
@torch.inference_mode()
def test_other_routing_changes_the_output_and_ends(moe, routing, k):
    expected = moe(TOKENS).logits
    with routed(moe, routing, k):
        changed = moe(TOKENS).logits
    with routed(moe, routing, k):
        again = moe(TOKENS).logits
    assert (changed - expected).abs().max() > 1e-3
    torch.testing.assert_close(changed, again)  # the noise is seeded
    torch.testing.assert_close(moe(TOKENS).logits, expected)


def test_unknown_routing_is_refused(mixtral):
    with (
        pytest.raises(ValueError, match="learned, random, inverted"),
        routed(mixtral, "best", 2),
    ):
        pass


def test_inverted_routing_picks_the_least_likely():
    logits = torch.randn(5, 8)
    inverted = reroute(logits, "inverted", torch.Generator())
    assert torch.equal(inverted.argmax(1), logits.argmin(1))


def test_padded_batches_score_like_single_rows(mixtral, words):
    pairs = [("w1 w2 w3", "w4"), ("w5", "w6 w7 w8 w9"), ("w1 w9", "w8 w2")]
    together = scoring.answer_scores(mixtral, words, pairs)
    alone = [scoring.answer_scores(mixtral, words, [pair])[0] for pair in pairs]
    np.testing.assert_allclose(together, alone, rtol=1e-4)
    log_probs = mixtral(torch.tensor([[5, 6, 7, 8, 9]])).logits[0].log_softmax(-1)
    expected = sum(log_probs[i, token] for i, token in enumerate([6, 7, 8, 9]))
    assert together[1] == pytest.approx(expected.item(), rel=1e-4)


def test_normalisation_decides_between_long_and_short(monkeypatch, mixtral, words):
    scores = np.array([-4.0, -6.0])  # the long answer is likelier by character
    monkeypatch.setattr(scoring, "answer_scores", lambda *_: scores)
    right = scoring.correct(mixtral, words, [Question("q", ("ab", "abcdef"), 1)])
    assert right["raw"].tolist() == [False]
    assert right["per_char"].tolist() == [True]


def test_bootstrap_interval_holds_the_mean():
    values = np.random.default_rng(0).normal(0.3, 1.0, 400)
    found = scoring.bootstrap(values)
    assert found["low"] < values.mean() < found["high"]
    half = 1.96 * values.std() / np.sqrt(len(values))  # the normal approximation
    assert found["high"] - found["low"] == pytest.approx(2 * half, rel=0.1)


def test_questions_are_read_once_and_without_examples(tmp_path):
    folder = tmp_path / "arc_easy" / "test_rc_5shot"
    folder.mkdir(parents=True)
    context = "Question: seen?\nAnswer: yes\n\nQuestion: why?\nAnswer:"
    doc = {"choices": ["because", "no "], "gold": 0}
    request = {"doc": doc, "request": {"context": context}}
    lines = [request | {"doc_id": i} for i in (0, 0, 1_000_000)]
    with gzip.open(folder / "requests.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, lines)))
    expected = [Question("Question: why?\nAnswer:", ("because", "no"), 0)]
    assert load_questions(tmp_path, "arc_easy") == expected


def test_documents_that_hold_a_question_are_dropped():
    question = "Which gas do green plants take in for photosynthesis?"
    banned = data.ngrams(question)
    holding = f"Quiz! {question.upper()} Oxygen?"
    kept = data.clean([holding, "Plants are green.", "Plants are green."], banned)
    assert kept == ["Plants are green."]


def test_splits_are_disjoint_and_complete():
    documents = [str(i) for i in range(300)]
    parts = data.split(documents, np.random.default_rng(0))
    assert [len(parts[name]) for name in ("validation", "test", "train")] == [3, 9, 288]
    assert sorted(chain(*parts.values())) == sorted(documents)


def test_windows_join_documents_by_the_end_token(words):
    windows = data.pack(words, ["w1 w2"] * 400)
    assert windows.shape == (1200 // data.WINDOW, data.WINDOW)
    assert windows[0, :6].tolist() == [1, 2, 62, 1, 2, 62]


def test_every_window_is_seen_once_an_epoch():
    windows = torch.arange(10).view(10, 1)
    seen = torch.cat(list(batches(windows, 5, 2, seed=0))).flatten()
    assert sorted(seen.tolist()) == list(range(10))


def test_learning_rate_warms_up_and_decays():
    rates = [schedule(step, 400) for step in range(400)]
    assert rates[0] < rates[20] < rates[39] == max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.05, abs=1e-3)
