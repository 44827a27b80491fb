# SPDX-License-Identifier: Apache-2.0
"""Look-ups against plain comparisons with every reference."""

import numpy as np
import pytest

from moe_tta.remix.embed import unit
from moe_tta.remix.lookup import LookUp, find_neighbours, read_pathways
from moe_tta.remix.weights import distance, weigh
from tests.remix.making import DIM, made_store, random_pathways

COUNT = 60


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    rng = np.random.default_rng(0)
    states = rng.standard_normal((COUNT, DIM)) + 0.5
    pathways = random_pathways(rng, COUNT)
    store = made_store(tmp_path_factory.mktemp("made"), states, pathways)
    return store, unit(states.astype(np.float32)), pathways.astype(np.float32)


@pytest.fixture(scope="module")
def query():
    rng = np.random.default_rng(1)
    return unit(rng.standard_normal(DIM) + 0.5)[0]


def order(vectors, query):
    similarities = vectors @ query
    return np.argsort(-similarities, kind="stable"), similarities


@pytest.mark.parametrize("kernel", ["gaussian", "cosine", "linear"])
def test_k_nearest(made, query, kernel):
    store, (vectors, norms), pathways = made
    rows, similarities = order(vectors, query)
    found = find_neighbours(store, query, LookUp(k=5, kernel=kernel))
    assert found.rows.tolist() == rows[:5].tolist()
    np.testing.assert_allclose(found.similarities, similarities[rows[:5]], rtol=1e-5)
    want = weigh(kernel, found.similarities, norms[rows[:5]])
    np.testing.assert_array_equal(found.weights, want)
    found = read_pathways(store, found, [2, 8])
    np.testing.assert_array_equal(found.pathways, pathways[rows[:5]][:, [1, 6]])


def test_radius(made, query):
    store, (vectors, _), _ = made
    rows, similarities = order(vectors, query)
    apart = distance(similarities[rows])
    radius = (apart[6] + apart[7]) / 2
    found = find_neighbours(store, query, LookUp(k=64, radius=radius))
    assert found.rows.tolist() == rows[:7].tolist()
    found = find_neighbours(store, query, LookUp(k=4, radius=radius))
    assert found.rows.tolist() == rows[:4].tolist()
    assert find_neighbours(store, query, LookUp(radius=apart[0] / 2)) is None


def test_floor(made, query):
    store, (vectors, _), _ = made
    rows, similarities = order(vectors, query)
    floor = (similarities[rows[1]] + similarities[rows[2]]) / 2
    found = find_neighbours(store, query, LookUp(k=5, floor=float(floor)))
    assert found.rows.tolist() == rows[:2].tolist()
    assert find_neighbours(store, query, LookUp(floor=0.999)) is None


def test_ceiling_looks_further(made, query):
    store, (vectors, _), _ = made
    rows, similarities = order(vectors, query)
    # more references above it than are asked for at first
    ceiling = float((similarities[rows[39]] + similarities[rows[40]]) / 2)
    found = find_neighbours(store, query, LookUp(k=2, floor=-1, ceiling=ceiling))
    assert found.rows.tolist() == rows[40:42].tolist()
    assert find_neighbours(store, query, LookUp(floor=-1, ceiling=-0.999)) is None


def test_the_question_itself_is_a_neighbour_unless_left_out(made):
    store, (vectors, _), _ = made
    one = find_neighbours(store, vectors[7], LookUp(k=1))
    assert (one.rows.tolist(), one.similarities[0]) == ([7], pytest.approx(1))
    assert one.similarities[0] <= 1
    other = find_neighbours(store, vectors[7], LookUp(k=1, ceiling=0.95))
    assert other.rows.tolist() != [7]


def test_kernels_without_weight_find_nothing(tmp_path):
    rng = np.random.default_rng(2)
    states = np.eye(4, DIM)
    store = made_store(tmp_path, states, random_pathways(rng, 4))
    away = -states[0].astype(np.float32)
    # cosines -1, 0, 0, 0: within the floor, but of no weight
    assert find_neighbours(store, away, LookUp(floor=-1, kernel="cosine")) is None
    found = find_neighbours(store, away, LookUp(floor=-1, kernel="polynomial"))
    assert found.weights.tolist() == [1, 1, 1]


def test_many_references_lose_few_near_ones(tmp_path):
    """With lists, as with the 100,000 of the benchmark, most neighbours are found."""
    rng = np.random.default_rng(3)
    centres = rng.standard_normal((200, DIM * 4))
    states = centres[rng.integers(0, 200, 6000)]
    states = states + 0.5 * rng.standard_normal(states.shape)
    store = made_store(
        tmp_path, states, random_pathways(rng, 6000), part_questions=2048
    )
    assert store.index.nprobe < 6000 // 40
    vectors = unit(states.astype(np.float32))[0]
    queries, _ = unit(states[::60] + 0.2 * rng.standard_normal((100, DIM * 4)))
    hits = 0
    for query in queries:
        found = find_neighbours(store, query, LookUp(k=5, floor=-1))
        hits += len({*found.rows.tolist()} & {*order(vectors, query)[0][:5].tolist()})
    assert hits >= 0.95 * 500
