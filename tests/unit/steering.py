# SPDX-License-Identifier: Apache-2.0
"""A small model's shape, some artefacts and a compiler for it."""

import numpy as np

from moe_tta.artefact import Artefact, ArtefactCard
from moe_tta.compile import compile_request
from moe_tta.shape import RouterShape
from moe_tta.spec import parse
from moe_tta.strategies import PlanContext

# the first decoder layer is dense, as in DeepSeek-V2-Lite
SHAPE = RouterShape(
    layers=(1, 2, 3, 4), num_hidden_layers=5, num_experts=16, top_k=4, k_max=6
)
SIZE = (4, 16)


def filled(dtype, value, neutral):
    array = np.full(SIZE, neutral, dtype)
    array[0, 0] = array[2, 5] = value
    return array


def artefact(**arrays):
    card = ArtefactCard(
        name="m",
        base_model="org/model",
        num_hidden_layers=5,
        layers=[1, 2, 3, 4],
        num_experts=16,
        created_by="test",
        sha256="",
    )
    return Artefact(card, arrays)


ARTEFACTS = {
    "graded": artefact(
        bias=filled(np.float32, 2.0, 0), scale=filled(np.float32, 3.0, 1)
    ),
    "sets": artefact(
        promote=filled(np.bool_, True, False),
        drop=np.roll(filled(np.bool_, True, False), 1, axis=1),
        allow=~np.roll(filled(np.bool_, True, False), 2, axis=1),
    ),
    "heavy": artefact(bias=filled(np.float32, 9e3, 0)),
}
CONTEXT = PlanContext(SHAPE, ARTEFACTS)


def compiled(value, context=CONTEXT):
    return compile_request(parse(value, presets={}), context)


def plan_of(value):
    """Return the one plan of a request whose span is `all`."""
    plans = compiled(value).plans
    assert plans[0] is plans[1] is plans[2]
    return plans[0]
