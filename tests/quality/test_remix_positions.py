# SPDX-License-Identifier: Apache-2.0
"""Re-mixing at another token than the prompt's last."""

import torch

from benchmarks.quality.remix.likelihoods import (
    log_likelihoods_at,
    plain_log_likelihoods,
    prompt_of,
)
from moe_tta.adapter import last_row_routing
from tests.quality.conftest import byte_model as byte_model
from tests.quality.test_remix import batch as batch
from tests.quality.test_remix import data as data
from tests.quality.test_remix import study as study
from tests.quality.test_remix import tokenizer as tokenizer
from tests.quality.test_scores import ROUNDING, num_answer_bytes


def test_another_position(batch):
    """At the last prompt token it is what the arms do there; own routing is plain."""
    model, layers = batch.study.model, batch.study.layers
    torch.testing.assert_close(batch.nearest.mean_at(0.999), batch.nearest.mean)
    last = [len(prompt_of(question)) - 1 for question in batch.encoded]
    given = log_likelihoods_at(model, batch.encoded, last, layers, batch.nearest.mean)
    wanted = batch.choices.log_likelihoods(batch.nearest.mean)
    assert_scores(batch, given, wanted)
    places = [place // 2 for place in last]
    heads = [
        prompt_of(question)[: place + 1]
        for question, place in zip(batch.encoded, places, strict=True)
    ]
    own = last_row_routing(model, heads)[
        :, [model.shape.layers.index(n) for n in layers]
    ]
    given = log_likelihoods_at(model, batch.encoded, places, layers, own)
    assert_scores(batch, given, plain_log_likelihoods(model, batch.encoded))
    moved = log_likelihoods_at(
        model, batch.encoded, places, layers, batch.nearest.mean_at(0.5)
    )
    assert moved != given


def assert_scores(batch, found, wanted):
    for question, some, others in zip(batch.questions, found, wanted, strict=True):
        apart = (torch.tensor(some) - torch.tensor(others)).abs()
        assert (apart <= ROUNDING * num_answer_bytes(question)).all()
