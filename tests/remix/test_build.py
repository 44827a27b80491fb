# SPDX-License-Identifier: Apache-2.0
"""Building stores: what is kept, in which order, and after a kill."""

import json

import numpy as np
import pytest

from moe_tta.remix import assemble, build
from moe_tta.remix.assemble import build_store
from moe_tta.remix.build import BuildOptions, work_folder
from moe_tta.remix.embed import unit
from moe_tta.remix.errors import StoreError
from moe_tta.remix.index import without_duplicates
from moe_tta.remix.store import load_store
from tests.remix.making import (
    DIM,
    MODEL,
    SHAPE,
    MadeEngine,
    made_store,
    random_pathways,
    write_questions,
)

OPTIONS = {"embedder": "hidden_last", "part_questions": 4, "duplicates_from": 2.0}
COUNT = 11


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return random_pathways(rng, COUNT), rng.standard_normal((COUNT, DIM))


def test_right_answers_are_kept_in_order(tmp_path, arrays, monkeypatch):
    monkeypatch.setattr(assemble, "SHARD_ROWS", 3)
    pathways, states = arrays
    verdicts = {0: "wrong", 4: "too_long", 5: "wrong", 6: "wrong", 7: "wrong"}
    engine = MadeEngine(pathways, states, verdicts)
    data, done = write_questions(tmp_path / "q.jsonl", COUNT), []
    options = BuildOptions(**OPTIONS)
    store = build_store(engine, data, tmp_path / "store", options, done.append)
    kept = [1, 2, 3, 8, 9, 10]
    assert store.card.counts.model_dump() == {
        **{"questions": 11, "too_long": 1, "wrong": 4, "duplicates": 0, "kept": 6}
    }
    assert store.card.shard_rows == [3, 3]
    assert done == [4, 4, 3]
    rows = np.array([5, 0, 3, 2])
    chosen = [kept[row] for row in rows]
    want = pathways[chosen].astype(np.float32)
    np.testing.assert_array_equal(store.pathways(rows, list(SHAPE.layers)), want)
    np.testing.assert_array_equal(store.pathways(rows, [3, 8]), want[:, [2, 6]])
    vectors, norms = unit(states[chosen].astype(np.float32))
    np.testing.assert_array_equal(store.embeddings(rows), vectors)
    np.testing.assert_array_equal(store.norms(rows), norms)
    assert [store.question(int(row)).prompt for row in rows] == [
        f"q{n}" for n in chosen
    ]
    assert not work_folder(tmp_path / "store").exists()


def test_the_mean_of_hidden_states(tmp_path, arrays):
    pathways, states = arrays
    store = made_store(tmp_path, states, pathways, embedder="hidden_mean")
    want = 2 * np.linalg.norm(states.astype(np.float32).astype(float), axis=1)
    np.testing.assert_array_equal(store.norms(np.arange(COUNT)), want.astype("f4"))
    assert store.card.embedder.kind == "hidden_mean"


def test_chosen_layers_in_half_precision(tmp_path, arrays):
    pathways, states = arrays
    options = {"layers": (8, 2), "precision": "float16"}
    store = made_store(tmp_path, states, pathways, **options)
    assert store.card.layers == [2, 8]
    got = store.pathways(np.array([1]), [2, 8])
    want = pathways[[1]][:, [1, 6]].astype(np.float32).astype(np.float16)
    np.testing.assert_array_equal(got, want)
    assert got.dtype == np.float32
    with pytest.raises(StoreError, match="holds no layer 3"):
        store.pathways(np.array([1]), [2, 3])


class Killed(Exception):
    pass


def test_a_killed_build_goes_on_where_it_was(tmp_path, arrays):
    pathways, states = arrays
    data, out = write_questions(tmp_path / "q.jsonl", COUNT), tmp_path / "store"

    def kill(done):
        kill.done += done
        if kill.done > 4:
            raise Killed

    kill.done = 0
    options = BuildOptions(**OPTIONS)
    with pytest.raises(Killed):
        build_store(MadeEngine(pathways, states), data, out, options, kill)
    # a part that was being written counts for nothing
    (work_folder(out) / "part-000002.partial").write_bytes(b"half")
    engine = MadeEngine(pathways, states)
    store = build_store(engine, data, out, options)
    assert engine.asked == [8, 9, 10]
    whole = build_store(MadeEngine(pathways, states), data, tmp_path / "two", options)
    assert store.card == whole.card


def test_a_kill_while_assembling(tmp_path, arrays, monkeypatch):
    pathways, states = arrays
    data, out = write_questions(tmp_path / "q.jsonl", COUNT), tmp_path / "store"
    options = BuildOptions(**OPTIONS)

    def killed(*args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(assemble, "write_index", killed)
        with pytest.raises(Killed):
            build_store(MadeEngine(pathways, states), data, out, options)
    assert not out.exists()
    engine = MadeEngine(pathways, states)
    assert len(build_store(engine, data, out, options)) == COUNT
    assert engine.asked == []


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("data_sha256", {}),
        ("model", {}),
        ("precision", {"precision": "float16"}),
        ("layers", {"layers": (1,)}),
        ("part_questions", {"part_questions": 5}),
    ],
)
def test_an_unfinished_build_is_not_mixed_with_another(tmp_path, arrays, name, options):
    data, out = write_questions(tmp_path / "q.jsonl", COUNT), tmp_path / "store"
    begun = BuildOptions(**OPTIONS)
    build.record_parts(MadeEngine(*arrays), data, out, begun, lambda done: None)
    model = MODEL.model_copy(update={"weights": "11"} if name == "model" else {})
    if name == "data_sha256":
        write_questions(data, COUNT - 1)
    engine = MadeEngine(*arrays, model=model)
    with pytest.raises(StoreError, match=f"unfinished build with another {name}"):
        build_store(engine, data, out, BuildOptions(**{**OPTIONS, **options}))


@pytest.mark.parametrize(
    ("verdicts", "options", "words"),
    [
        (dict.fromkeys(range(COUNT), "wrong"), {}, "none of 11 questions was answered"),
        ({}, {"layers": (4,)}, "layer 4 is no MoE layer"),
    ],
)
def test_refused(tmp_path, arrays, verdicts, options, words):
    data = write_questions(tmp_path / "q.jsonl", COUNT)
    engine = MadeEngine(*arrays, verdicts)
    with pytest.raises(StoreError, match=words):
        build_store(
            engine, data, tmp_path / "s", BuildOptions(**{**OPTIONS, **options})
        )


def test_nothing_is_overwritten(tmp_path, arrays):
    (tmp_path / "store").mkdir()
    data = write_questions(tmp_path / "q.jsonl", COUNT)
    with pytest.raises(StoreError, match="exists already"):
        build_store(
            MadeEngine(*arrays), data, tmp_path / "store", BuildOptions(**OPTIONS)
        )


def test_near_duplicates_are_dropped(tmp_path, arrays):
    pathways, states = arrays
    states = states.copy()
    states[3] = 2 * states[1]  # the same direction
    states[9] = states[1]
    store = made_store(
        tmp_path, states, pathways, duplicates_from=0.98, part_questions=4
    )
    assert store.card.counts.duplicates == 2
    prompts = [store.question(row).prompt for row in range(len(store))]
    assert prompts == [f"q{i}" for i in range(COUNT) if i not in (3, 9)]
    assert json.loads((store.path / "card.json").read_text())["duplicates_from"] == 0.98


def test_duplicates_equal_the_plain_rule():
    rng = np.random.default_rng(5)
    vectors, _ = unit(rng.standard_normal((300, 3)))
    kept: list[int] = []
    for row, vector in enumerate(vectors):
        if not (vectors[kept] @ vector >= 0.95).any():
            kept.append(row)
    blocks = (vectors[first : first + 32] for first in range(0, 300, 32))
    flags = list(without_duplicates(blocks, 0.95))
    assert np.flatnonzero(flags).tolist() == kept
    assert 20 < len(kept) < 200


def test_a_store_reads_back_as_it_was_built(tmp_path, arrays):
    pathways, states = arrays
    store = made_store(tmp_path, states, pathways)
    assert load_store(store.path).card == store.card
