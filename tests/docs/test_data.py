# SPDX-License-Identifier: Apache-2.0
"""JSON blocks are what they claim to be, and every block claims to be something."""

import json
from dataclasses import replace

import numpy as np
import pytest

from moe_tta import RouterShape
from moe_tta.artefact import Artefact, ArtefactCard
from moe_tta.compile import compile_request
from moe_tta.deferred import DeferredRequest, compile_or_defer
from moe_tta.remix.card import ModelCard
from moe_tta.remix.serving import ServedTokens
from moe_tta.settings import AdapterSettings, EngineSettings
from moe_tta.spec import parse
from moe_tta.strategies import PlanContext, Prompt
from tests.docs.blocks import BLOCKS, select
from tests.remix.making import made_store, served
from tests.remix.tokens import token_card

LAB = RouterShape(
    layers=tuple(range(30)), num_hidden_layers=30, num_experts=8, top_k=2, k_max=4
)
KINDS = ("bash", "python", "json request", "json settings", "json response", "text")


def context():
    """The lab model, with the artefact that docs/strategies/steer.md saves."""
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


class Everywhere(dict):
    """Embeds every text alike."""

    def __missing__(self, text):
        return [1.0] * 8


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """The pages' stores: `solved` with eight references, `solved-tokens` with 40."""
    model = ModelCard.of(LAB, name="lab", weights="", dtype="float32")
    size = (8, len(LAB.layers))
    pathways = np.random.default_rng(0).dirichlet(np.ones(LAB.num_experts), size)
    folder = tmp_path_factory.mktemp("stores")
    store = made_store(folder, 3 * np.eye(8) + 1, pathways, model)
    tokens = ServedTokens(token_card(model, 40, LAB.layers), 2)
    return {"solved": served(store, Everywhere()), "solved-tokens": tokens}


@pytest.mark.parametrize("block", select("json request"), ids=str)
def test_requests_are_accepted(block, stores):
    full = replace(context(), stores=stores, adapter=AdapterSettings())
    compiled = compile_or_defer(parse(block.text, presets={}), full)
    if isinstance(compiled, DeferredRequest):
        prompt = Prompt([5, 6], lambda ids: "a prompt", lambda text: text.encode())
        compiled = compiled.compile(full, prompt)
    assert compiled.pair or compiled.rounds or not compiled.neutral


@pytest.mark.parametrize("block", select("json settings"), ids=str)
def test_settings_are_accepted(block):
    settings = EngineSettings.read(json.loads(block.text))
    for preset in settings.presets.values():
        compile_request(preset, context())


@pytest.mark.parametrize("block", select("json response"), ids=str)
def test_responses_are_json(block):
    assert json.loads(block.text)["error"]["code"] == 400
