# SPDX-License-Identifier: Apache-2.0
"""JSON blocks are what they claim to be, and every block claims to be something."""

import json

import pytest

from moe_tta import RouterShape
from moe_tta.artefact import Artefact, ArtefactCard
from moe_tta.compile import compile_request
from moe_tta.settings import EngineSettings
from moe_tta.spec import parse
from moe_tta.strategies import PlanContext
from tests.docs.blocks import BLOCKS, select

LAB = RouterShape(
    layers=tuple(range(30)), num_hidden_layers=30, num_experts=8, top_k=2, k_max=4
)
KINDS = ("bash", "python", "json request", "json settings", "json response", "text")


def context():
    """The lab model, with the artefact that docs/strategies/steer.md saves."""
    import numpy as np

    card = ArtefactCard(
        name="formal",
        base_model="smollm2-moe",
        num_hidden_layers=30,
        layers=list(range(30)),
        num_experts=8,
        created_by="a test",
        sha256="",
    )
    bias = np.ones((30, 8), np.float32)
    return PlanContext(LAB, {"formal": Artefact(card, {"bias": bias})})


def test_every_block_is_of_a_kind_that_some_test_reads():
    assert [(str(b), b.info) for b in BLOCKS if b.info not in KINDS] == []


@pytest.mark.parametrize("block", select("json request"), ids=str)
def test_requests_are_accepted(block):
    compiled = compile_request(parse(block.text, presets={}), context())
    assert compiled.pair or not compiled.neutral


@pytest.mark.parametrize("block", select("json settings"), ids=str)
def test_settings_are_accepted(block):
    settings = EngineSettings.read(json.loads(block.text))
    for preset in settings.presets.values():
        compile_request(preset, context())


@pytest.mark.parametrize("block", select("json response"), ids=str)
def test_responses_are_json(block):
    assert json.loads(block.text)["error"]["code"] == 400
