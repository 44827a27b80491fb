# SPDX-License-Identifier: Apache-2.0
"""The lab model: gradients equal to transformers', and real text that gets likelier."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from moe_tta.adapter import AdapterModel, Outcome, Rerouting
from moe_tta.adapter.curve import loss_curves
from moe_tta.adapter.descent import autograd_gradient
from tests.adapter import independent
from tests.adapter.test_gradient import relative, size, tail_of

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(lab):
    return lab("smollm2-moe")


def paragraphs(count, most=160):
    """Return prose of this repository: English nobody made up for the test."""
    found = []
    for page in sorted(ROOT.glob("docs/**/*.md")):
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for part in text.split("\n\n"):
            words = " ".join(part.split())
            if re.match(r"[A-Z][a-z]+ ", words) and len(words) >= most:
                found.append(words[:most])
    assert len(found) >= count
    return found[:count]


def test_equals_independent_autograd(folder, draw):
    model = AdapterModel.from_checkpoint(folder, torch.float32)
    tokens = AutoTokenizer.from_pretrained(folder)(paragraphs(1)[0]).input_ids
    delta = 0.1 * draw.normal(*size(model))
    ours = autograd_gradient(tail_of(model, [tokens], delta[None]).loss)(delta[None])
    theirs = independent.load(folder)
    loss, slope = independent.context_gradient(theirs, tokens, delta)
    assert abs(float(ours[0][0] - loss)) <= 1e-5 * float(loss)
    assert relative(ours[1][0], slope) <= 1e-5


def test_real_text_gets_likelier(folder):
    model = AdapterModel.from_checkpoint(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer(text[:80]).input_ids for text in paragraphs(20)]
    settings = Rerouting(steps=2, sign=-1)
    done = loss_curves(model, texts, settings, batch=10)
    assert all(one.outcome is Outcome.ADAPTED for one in done)
    assert all(len(one.losses) == 3 for one in done)
    # the figure itself is measured on more and longer text: docs/adapter.md
    fallen = sum(one.losses[-1] < one.losses[0] for one in done)
    assert fallen > len(done) / 2
