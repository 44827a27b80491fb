# SPDX-License-Identifier: Apache-2.0
"""Stores that were damaged, changed or made for something else are refused."""

import json
import os
import struct

import numpy as np
import pytest

from moe_tta.remix.card import CARD_FILE
from moe_tta.remix.checkpoint import weights_hash
from moe_tta.remix.errors import StoreError
from moe_tta.remix.index import build_index, read_index, write_index
from moe_tta.remix.shards import Shard, sha256, write_tensors
from moe_tta.remix.store import (
    INDEX_FILE,
    TEXTS_FILE,
    check_pathways,
    load_store,
    shard_file,
)
from tests.remix.making import DIM, MODEL, made_store, random_pathways

FILES = (CARD_FILE, INDEX_FILE, TEXTS_FILE, shard_file(0))


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    states = rng.standard_normal((20, DIM))
    return made_store(tmp_path, states, random_pathways(rng, 20)).path


@pytest.mark.parametrize("name", FILES)
def test_missing_files(folder, name):
    (folder / name).unlink()
    with pytest.raises(StoreError, match=f"{name}: cannot be read: No such file"):
        load_store(folder)


@pytest.mark.parametrize("name", FILES)
def test_truncated_files(folder, name):
    path = folder / name
    os.truncate(path, path.stat().st_size // 2)
    words = "Invalid JSON" if name == CARD_FILE else "bytes, the card says"
    with pytest.raises(StoreError, match=rf"{name}: .*{words}"):
        load_store(folder)


@pytest.mark.parametrize("name", FILES[1:])
def test_changed_bytes(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(StoreError, match=f"{name}: sha256 is .* damaged or changed"):
        load_store(folder)


def edit_card(folder, **members):
    card = json.loads((folder / CARD_FILE).read_text())
    (folder / CARD_FILE).write_text(json.dumps({**card, **members}))


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"format": "moe-tta-remix-2"}, "format: "),
        ({"extra": 1}, "extra: Extra inputs"),
        ({"layers": [1, 4]}, r"layers \[1, 4\] are not the model's"),
        ({"layers": [2, 1]}, r"layers \[2, 1\] are not the model's"),
        ({"layers": [1, 2]}, "pathways is float32"),
        ({"precision": "float16"}, "pathways is float32"),
        ({"shard_rows": [19]}, "shard_rows do not add up to 20"),
        ({"shard_rows": [10, 10]}, "lists other files"),
    ],
)
def test_cards_that_do_not_fit(folder, members, words):
    edit_card(folder, **members)
    with pytest.raises(StoreError, match=words):
        load_store(folder)


def replace_file(folder, name, write):
    """Put a file of another content in place, with the right hash on the card."""
    path = folder / name
    path.unlink()
    write(path)
    card = json.loads((folder / CARD_FILE).read_text())
    card["files"][name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    (folder / CARD_FILE).write_text(json.dumps(card))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "ends before byte 8"),
        (struct.pack("<Q", 1 << 60) + b"{}", "its header leaves the file"),
        (struct.pack("<Q", 2) + b"[]", "unreadable as safetensors"),
        (struct.pack("<Q", 2) + b"{}", "holds no tensor 'pathways'"),
        (struct.pack("<Q", 4) + b"{{{{", "unreadable as safetensors"),
    ],
)
def test_shards_that_are_none(folder, data, words):
    replace_file(folder, shard_file(0), lambda path: path.write_bytes(data))
    with pytest.raises(StoreError, match=words):
        load_store(folder)


def test_an_index_of_something_else(folder):
    other = build_index(np.eye(4, DIM, dtype=np.float32))
    replace_file(folder, INDEX_FILE, lambda path: write_index(other, path))
    with pytest.raises(StoreError, match="4 rows of 8 dimensions, the card says 20"):
        load_store(folder)
    replace_file(folder, INDEX_FILE, lambda path: path.write_bytes(b"none"))
    with pytest.raises(StoreError, match="faiss cannot read it"):
        load_store(folder)


def test_foreign_models_are_named(folder):
    store = load_store(folder)
    store.check(MODEL.model_copy(update={"name": "the same, renamed"}))
    other = MODEL.model_copy(update={"weights": "ff", "dtype": "bfloat16"})
    with pytest.raises(StoreError) as caught:
        store.check(other)
    words = "not for this model: weights 00 != ff; dtype float32 != bfloat16"
    assert words in str(caught.value)


def test_a_file_that_shrinks_while_it_is_open(folder):
    """A memory map would kill the process here."""
    store = load_store(folder)
    os.truncate(folder / shard_file(0), 64)
    with pytest.raises(StoreError, match="ends before byte"):
        store.pathways(np.array([19]), [1])


def test_rows_of_a_tensor(tmp_path):
    rng = np.random.default_rng(1)
    tensors = {
        "a": rng.random((5, 3, 2)).astype(np.float16),
        "b": rng.random(7).astype(np.float32),
    }
    write_tensors(tmp_path / "x.safetensors", tensors)
    shard = Shard(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(shard.rows("a", 1, 3), tensors["a"][1:4])
    np.testing.assert_array_equal(shard.rows("b", 6, 1), tensors["b"][6:])
    assert (shard.shape("a"), shard.dtype("a")) == ((5, 3, 2), np.float16)


@pytest.mark.parametrize("rows", [100, 5000])
def test_an_index_finds_what_it_holds(tmp_path, rows):
    rng = np.random.default_rng(2)
    vectors = rng.standard_normal((rows, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    write_index(build_index(vectors), tmp_path / "index")
    index = read_index(tmp_path / "index", rows, DIM)
    found = index.search(vectors[::10], 1)[1][:, 0]
    assert found.tolist() == list(range(0, rows, 10))


@pytest.mark.parametrize("bad", [[0.5, 0.4], [1.5, -0.5], [np.nan, 1], [np.inf, 0]])
def test_pathways_are_distributions(bad):
    check_pathways(np.array([[[0.5, 0.5]]]))
    with pytest.raises(StoreError):
        check_pathways(np.array([[[0.5, 0.5]], [bad]]))


def test_weights_hash_sees_every_file_and_every_tensor(tmp_path):
    weights = {"w": np.zeros(3 << 20, np.float32)}  # 12 MiB: small enough to be read
    large = {"w": np.zeros(6 << 20, np.float32)}  # 24 MiB: sampled
    write_tensors(tmp_path / "model.safetensors", weights)
    hashes = [weights_hash(tmp_path)]
    weights["w"][12345] = 1
    write_tensors(tmp_path / "model.safetensors", weights)
    hashes.append(weights_hash(tmp_path))
    write_tensors(tmp_path / "second.safetensors", large)
    hashes.append(weights_hash(tmp_path))
    large["w"][:] = 1e-3  # trained further: every weight moved
    write_tensors(tmp_path / "second.safetensors", large)
    hashes.append(weights_hash(tmp_path))
    write_tensors(tmp_path / "second.safetensors", {"v": large["w"]})
    hashes.append(weights_hash(tmp_path))
    assert len(set(hashes)) == 5
    assert weights_hash(tmp_path) == hashes[-1]
    with pytest.raises(StoreError, match="no safetensors file"):
        weights_hash(tmp_path / "nothing")
