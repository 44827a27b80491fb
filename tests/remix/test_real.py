# SPDX-License-Identifier: Apache-2.0
"""A store built by real vLLM from real text, with the real embedder."""

import json
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm import SamplingParams

from moe_tta.deferred import compile_or_defer
from moe_tta.remix.assemble import build_store
from moe_tta.remix.build import BuildOptions, Recorded
from moe_tta.remix.embed import MINILM, TextEmbedder, open_embedder, unit
from moe_tta.remix.errors import StoreError
from moe_tta.remix.questions import Question, read_questions
from moe_tta.remix.serving import ServedStore
from moe_tta.remix.store import Store
from moe_tta.spec import parse
from moe_tta.strategies import PlanContext, Prompt
from moe_tta.vllm_plugin.remix_engine import ReferenceEngine, record_pathways
from tests.plugin.engine import engine

CHOICES = [
    ("The river runs through the old", ["town", "zebra zebra"], 0),
    ("The sun is hot and the snow is", ["cold", "of of the"], 0),
    ("She opened the door and went", ["qqq xx", "inside"], 1),
    ("A dog is an", ["animal", "number"], 0),
    ("Water is made of hydrogen and", ["oxygen", "oxygen oxygen oxygen"], 1),
]
COUNTING = "One, two, three,"


class Built(NamedTuple):
    store: Store
    questions: list[Question]
    verdicts: list[str]
    prompts: list[list[int]]  # of the questions with choices
    recorded: Recorded  # theirs
    shape: Any


@pytest.fixture(scope="module")
def built(lab, tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    data = folder / "questions.jsonl"
    lines = [
        {"prompt": prompt, "choices": choices, "gold": gold, "text": f"{prompt}..."}
        for prompt, choices, gold in CHOICES
    ]
    options = {"dtype": "float32", "max_model_len": 96, "skip_tokenizer_init": False}
    with engine(lab("olmoe-fine"), **options) as llm:
        params = SamplingParams(temperature=0, max_tokens=32)
        (said,) = llm.generate([COUNTING], params, use_tqdm=False)
        first_line = said.outputs[0].text.strip().split("\n")[0]
        for answers in ([first_line.upper() + "!"], ["no such answer"]):
            lines.append({"prompt": COUNTING, "answers": answers})
        lines.append({"prompt": "word " * 200, "answers": ["word"]})
        data.write_text("\n".join(map(json.dumps, lines)), "utf-8")
        questions, asked = list(read_questions(data)), ReferenceEngine(llm, "raw")
        verdicts = asked.judge(questions)
        store = build_store(asked, data, folder / "store", BuildOptions())
        prompts = [llm.get_tokenizer().encode(prompt) for prompt, *_ in CHOICES]
        recorded = record_pathways(llm, prompts)
        shape = llm.llm_engine.input_processor.moe_tta.shape
    return Built(store, questions, verdicts, prompts, recorded, shape)


@torch.inference_mode()
def test_verdicts_are_those_of_transformers(built, lab):
    from transformers import AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(lab("olmoe-fine"), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(lab("olmoe-fine"))
    for (prompt, choices, gold), verdict in zip(CHOICES, built.verdicts, strict=False):
        sums = []
        for choice in choices:
            ids = torch.tensor([tokenizer.encode(f"{prompt} {choice}")])
            table = model(ids).logits[0].log_softmax(dim=-1)
            start = len(tokenizer.encode(prompt))
            rows = range(start - 1, ids.shape[1] - 1)
            sums.append(sum(table[i, ids[0, i + 1]].item() for i in rows))
        assert abs(sums[0] - sums[1]) > 0.1  # no tie that rounding could turn
        assert verdict == ("right" if int(np.argmax(sums)) == gold else "wrong")
    assert built.verdicts[5:] == ["right", "wrong", "too_long"]
    assert {"right", "wrong"} <= set(built.verdicts[:5])


def test_the_store_holds_what_was_answered_rightly(built):
    store, questions = built.store, built.questions
    kept = [i for i, verdict in enumerate(built.verdicts) if verdict == "right"]
    counts = store.card.counts
    wrong = built.verdicts.count("wrong")
    assert (counts.questions, counts.too_long, counts.wrong) == (8, 1, wrong)
    assert counts.kept == len(kept)
    assert [store.question(row) for row in range(len(store))] == [
        questions[i] for i in kept
    ]
    assert store.card.model.top_k == 8
    assert store.card.embedder.model == MINILM
    rows = [row for row, number in enumerate(kept) if number < len(CHOICES)]
    got = store.pathways(np.array(rows), list(built.shape.layers))
    want = built.recorded.pathways[[kept[row] for row in rows]]
    # the same prompts in another batch: float32 softmax of float32 logits
    np.testing.assert_array_equal(got, want)


def test_the_embedder_finds_its_own_texts(built):
    store = built.store
    embedder = open_embedder(store.card.embedder)
    context = PlanContext(built.shape, stores={"solved": ServedStore(store, embedder)})
    asked = compile_or_defer(
        parse({"remix": {"store": "solved", "k": 1}}, presets={}), context
    )
    for row in range(len(store)):
        text = store.question(row).embedded
        vector = unit(embedder.embed(text))[0]
        near = store.embeddings(np.array([row]))[0] @ vector
        assert near > 0.999  # alone and in a batch: other padding, other rounding
        plan = asked.compile(context, Prompt([1], lambda ids, text=text: text)).plans[1]
        want = store.pathways(np.array([row]), list(built.shape.layers[-5:]))[0]
        np.testing.assert_array_equal(plan.target[-5:], want)


def test_another_embedder_is_refused(built, tmp_path):
    card = built.store.card.embedder
    with pytest.raises(StoreError, match="the store was built with 00"):
        open_embedder(card.model_copy(update={"weights": "00"}))
    with pytest.raises(StoreError, match="neither a folder nor in"):
        TextEmbedder(str(tmp_path / "nothing"))
    assert open_embedder(card.model_copy(update={"kind": "hidden_last"})) is None
