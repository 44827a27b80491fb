# SPDX-License-Identifier: Apache-2.0
"""Updates outside the server equal the plain rules over all references."""

import numpy as np
import pytest

from moe_tta.deferred import compile_or_defer
from moe_tta.remix import assemble, offline, store
from moe_tta.remix.lookup import LookUp
from moe_tta.remix.updates import mean_shift, nearest_pathways, regress
from moe_tta.spec import parse
from moe_tta.strategies import PlanContext, Prompt
from tests.remix.making import DIM, SHAPE, made_store, random_pathways, served

COUNT, LAYERS, PLACES = 50, [6, 7, 8], [4, 5, 6]


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    pathways = random_pathways(rng, COUNT).astype(np.float32)
    return pathways, rng.standard_normal((COUNT, DIM)).astype(np.float32)


@pytest.fixture
def references(tmp_path, arrays, monkeypatch):
    monkeypatch.setattr(assemble, "SHARD_ROWS", 16)
    monkeypatch.setattr(store, "BLOCK_ROWS", 7)
    return made_store(tmp_path, arrays[1], arrays[0], part_questions=10)


def test_blocks_are_all_rows_in_order(references, arrays):
    assert len(references.card.shard_rows) > 1
    rows, pathways = zip(*references.blocks(LAYERS), strict=True)
    assert np.concatenate(rows).tolist() == list(range(COUNT))
    np.testing.assert_array_equal(np.concatenate(pathways), arrays[0][:, PLACES])


@pytest.mark.parametrize("k", [1, 5, COUNT + 9])
def test_nearest_by_pathway(references, arrays, k):
    own = random_pathways(np.random.default_rng(1), 1)[0][PLACES]
    all_of_them = arrays[0][:, PLACES]
    want = nearest_pathways(own, all_of_them, k)
    found = offline.nearest_by_pathway(references, own, k, LAYERS)
    assert found.rows.tolist() == want.tolist()
    np.testing.assert_array_equal(found.pathways, all_of_them[want])


def test_a_reference_is_its_own_nearest(references, arrays):
    own = arrays[0][17][PLACES].astype(float)
    found = offline.nearest_by_pathway(references, own, 2, LAYERS)
    assert found.rows[0] == 17
    assert found.similarities[0] == pytest.approx(1)


def test_mode(references, arrays):
    own = random_pathways(np.random.default_rng(2), 1)[0][PLACES]
    near = arrays[0][:, PLACES][nearest_pathways(own, arrays[0][:, PLACES], 4)]
    options = {"alpha": 0.2, "bandwidth": 0.7, "steps": 3}
    got = offline.find_mode(references, own, LAYERS, k=4, **options)
    np.testing.assert_array_equal(got, mean_shift(own, near, **options))


def test_what_is_sent_is_what_the_server_would_plan(references, arrays):
    query = arrays[1][3] / np.linalg.norm(arrays[1][3])
    found = offline.borrow(references, query, LookUp(k=4), LAYERS)
    sent = offline.as_request(LAYERS, regress(found))
    context = PlanContext(SHAPE, stores={"solved": served(references)})
    looked_up = {"store": "solved", "k": 4, "vector": query.tolist(), "layers": [6, 8]}
    one, two = (
        compile_or_defer(parse({"remix": member}, presets={}), context)
        .compile(context, Prompt([1], str))
        .plans[1]
        for member in (sent, looked_up)
    )
    np.testing.assert_allclose(one.target, two.target, rtol=2**-23)
    np.testing.assert_array_equal(one.mix, two.mix)
    assert (
        offline.borrow(references, query, LookUp(floor=1.0, ceiling=0.5), [8]) is None
    )


@pytest.mark.parametrize("row", [[0, 0], [-1, 2], [np.nan, 1]])
def test_rows_without_mass_are_not_sent(row):
    assert offline.as_request([3], [[1, 3]]) == {"distribution": {"3": [0.25, 0.75]}}
    with pytest.raises(ValueError, match="with mass"):
        offline.as_request([3], [row])
