# SPDX-License-Identifier: Apache-2.0
"""Token stores: what is written is read, and what is wrong is refused."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from moe_tta.cli import app
from moe_tta.remix.card import CARD_FILE
from moe_tta.remix.errors import StoreError
from moe_tta.remix.serving import open_served_tokens
from moe_tta.remix.shards import sha256, write_tensors
from moe_tta.remix.store import load_store
from moe_tta.remix.tokens import layer_file, load_tokens
from moe_tta.vllm_plugin.memories import Memories
from tests.remix.making import MODEL, SHAPE, made_store, random_pathways
from tests.remix.tokens import made_tokens, random_layers

TOKENS, HIDDEN, LAYERS = 12, 16, [1, 5]
FILES = (CARD_FILE, *map(layer_file, LAYERS))


@pytest.fixture
def drawn():
    rng = np.random.default_rng(0)
    return random_layers(rng, MODEL, TOKENS, HIDDEN, layers=LAYERS)


@pytest.fixture
def folder(tmp_path, drawn):
    return made_tokens(tmp_path / "store", MODEL, drawn).path


def test_round_trip(folder, drawn):
    store = load_tokens(folder)
    assert len(store) == TOKENS
    for number, layer in store.layers():
        keys, ids, weights = drawn[number]
        unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
        np.testing.assert_array_equal(layer.keys, unit.astype(np.float32))
        np.testing.assert_array_equal(layer.ids, ids)
        np.testing.assert_array_equal(layer.weights, weights.astype(np.float32))


def test_memories_hold_the_same_in_their_own_layers(folder, drawn):
    memories = Memories([(3, load_tokens(folder))], SHAPE, torch.device("cpu"))
    assert (memories.count, memories.nbytes) == (
        1,
        load_tokens(folder).card.memory_bytes,
    )
    held = 0
    for index, number in enumerate(SHAPE.layers):
        *others, memory = memories.layer(index)
        assert others == [None, None]
        if number not in LAYERS:
            assert memory is None
            continue
        held += memory.keys.nbytes + memory.values.nbytes
        keys, ids, weights = drawn[number]
        unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
        # stored in float32, then scaled to length 1 again
        np.testing.assert_allclose(memory.keys, unit, atol=2.0**-24)
        dense = np.zeros((TOKENS, SHAPE.num_experts), np.float32)
        np.put_along_axis(dense, ids, weights.astype(np.float32), axis=1)
        np.testing.assert_array_equal(memory.values, dense)
    assert held == memories.nbytes


def test_packed_memories_hold_what_the_stores_do(folder, drawn, tmp_path):
    """Float32 keys as stored, what makes them of length 1, one store behind another."""
    rng = np.random.default_rng(1)
    layers = random_layers(rng, MODEL, 5, HIDDEN, layers=LAYERS[:1])
    other = made_tokens(tmp_path / "other", MODEL, layers)
    stores = [(3, load_tokens(folder)), (1, other)]
    memories = Memories(stores, SHAPE, torch.device("cpu"), packed=True)
    plain = Memories(stores, SHAPE, torch.device("cpu"))
    held = 0
    for index, number in enumerate(SHAPE.layers):
        packed, parts = memories.packed(index), plain.layer(index)
        if number not in LAYERS:
            assert packed is None
            continue
        held += packed.nbytes
        there = [part for part in parts if part is not None]
        sizes = [0 if part is None else len(part.keys) for part in parts]
        assert packed.starts.tolist() == [0, *np.cumsum(sizes)]
        assert sizes == [5 if number == LAYERS[0] else 0, 0, TOKENS]
        assert packed.keys.dtype == torch.float32
        unit = packed.keys.double() * packed.inverse_lengths[:, None]
        wide = torch.cat([part.keys for part in there])
        # the same but for float64's rounding of two operations
        np.testing.assert_allclose(unit, wide, rtol=4 * 2.0**-52)
        assert torch.equal(packed.values, torch.cat([part.values for part in there]))
    assert (memories.count, memories.nbytes) == (2, held)
    assert memories.nbytes < plain.nbytes


def test_engines_without_token_stores_hold_nothing():
    memories = Memories([], SHAPE, torch.device("cpu"))
    assert (memories.count, memories.nbytes, memories.layer(0)) == (0, 0, ())
    packed = Memories([], SHAPE, torch.device("cpu"), packed=True)
    assert (packed.count, packed.nbytes, packed.packed(0)) == (0, 0, None)


@pytest.mark.parametrize("name", FILES)
def test_missing_files(folder, name):
    (folder / name).unlink()
    with pytest.raises(StoreError, match=f"{name}: cannot be read: No such file"):
        load_tokens(folder)


@pytest.mark.parametrize("name", FILES)
def test_truncated_files(folder, name):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    words = "Invalid JSON" if name == CARD_FILE else "bytes, the card says"
    with pytest.raises(StoreError, match=words):
        load_tokens(folder)


def test_one_changed_byte(folder):
    path = folder / layer_file(5)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match="damaged or changed"):
        load_tokens(folder)


def change_card(folder, **members):
    card = json.loads((folder / CARD_FILE).read_text())
    (folder / CARD_FILE).write_text(json.dumps({**card, **members}))


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"layers": [1, 4]}, "layers .* are not the model's"),
        ({"layers": [5, 1]}, "layers .* are not the model's"),
        ({"layers": [1, 2]}, "lists other files"),
        ({"hidden_size": 8}, "memory_bytes is"),
        ({"memory_bytes": 1}, "memory_bytes is 1, but the store takes"),
        ({"format": "moe-tta-tokens-9"}, "format"),
        ({"extra": 1}, "extra"),
    ],
)
def test_cards_that_contradict_the_store(folder, members, words):
    change_card(folder, **members)
    with pytest.raises(StoreError, match=words):
        load_tokens(folder)


def replace_layer(folder, change):
    """Write other numbers, with the right hash on the card."""
    path = folder / layer_file(1)
    layer = load_tokens(folder).layer(1)
    tensors = {name: part.copy() for name, part in layer._asdict().items()}
    tensors = change(tensors) or tensors
    write_tensors(path, tensors)
    entry = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    files = json.loads((folder / CARD_FILE).read_text())["files"]
    change_card(folder, files={**files, path.name: entry})


WRONG = {
    "nan key": (lambda t: t["keys"].__setitem__((3, 0), np.nan), "not of length 1"),
    "long key": (lambda t: t["keys"].__imul__(2) is None, "not of length 1"),
    "expert": (lambda t: t["ids"].__setitem__((0, 0), 6), "none of 0..5"),
    "twice": (lambda t: t["ids"].__setitem__(0, t["ids"][0, 0]), "an expert twice"),
    "negative": (lambda t: t["weights"].__setitem__((0, 1), -0.1), "negative or no"),
    "nan": (lambda t: t["weights"].__setitem__((0, 1), np.nan), "negative or no"),
    "nothing": (lambda t: t["weights"].__setitem__(0, 0), "negative or no"),
    "sum": (lambda t: t["weights"].__setitem__(0, 0.6), "sum to more than 1"),
    "rows": (lambda t: {n: a[:5] for n, a in t.items()}, r"keys is float32 \(5, 16\)"),
    "name": (lambda t: {"keys": t["keys"], "ids": t["ids"]}, "no tensor 'weights'"),
}


@pytest.mark.parametrize(("change", "words"), WRONG.values(), ids=WRONG)
def test_numbers_no_store_may_hold(folder, change, words):
    replace_layer(folder, change)
    with pytest.raises(StoreError, match=words):
        load_tokens(folder)
    # nothing is loaded of a store that the API process refuses
    assert Memories([], SHAPE, torch.device("cpu")).count == 0


def test_other_models_and_too_much_memory(folder):
    open_served_tokens(folder, MODEL, 1)
    other = MODEL.model_copy(update={"weights": "ff", "dtype": "bfloat16"})
    words = "not for this model: weights 00 != ff; dtype float32 != bfloat16"
    with pytest.raises(StoreError, match=words):
        open_served_tokens(folder, other, 1)
    with pytest.raises(StoreError, match="MiB of memory, more than max_store_mib, 0"):
        open_served_tokens(folder, MODEL, 0)


def test_kinds_are_told_apart(folder, tmp_path):
    with pytest.raises(StoreError, match="holds single tokens, not questions"):
        load_store(folder)
    rng = np.random.default_rng(0)
    states = rng.standard_normal((3, 8))
    questions = made_store(tmp_path / "other", states, random_pathways(rng, 3))
    with pytest.raises(StoreError, match="holds questions, not single tokens"):
        load_tokens(questions.path)


def test_show(folder):
    result = CliRunner().invoke(app, ["remix", "show", str(folder)])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["counts"]["tokens"] == TOKENS
    (folder / layer_file(5)).write_bytes(b"")
    result = CliRunner().invoke(app, ["remix", "show", str(folder)])
    assert result.exit_code == 1
    assert "0 bytes, the card says" in result.output


def test_tokens_command_refuses_what_it_cannot_build(tiny_models, folder, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "answers": ["b"]}\n')
    words = ["remix", "tokens", tiny_models("granitemoe"), str(data), "-o"]
    result = CliRunner().invoke(app, [*words, str(folder)])
    assert (result.exit_code, "exists already" in result.output) == (1, True)
    result = CliRunner().invoke(app, [*words, str(tmp_path / "new")])
    assert (result.exit_code, "cannot take gradients" in result.output) == (1, True)
    data.write_text('{"prompt": "a"}\n')
    result = CliRunner().invoke(app, [*words, str(tmp_path / "new")])
    assert "either choices or answers" in result.output
