# SPDX-License-Identifier: Apache-2.0
"""Saved artefacts: the round trip, and every fault found on loading."""

import dataclasses
import hashlib
import json
import pickle

import numpy as np
import pytest
from safetensors.numpy import save

from moe_tta.artefact import ArtefactError, load_artefact, save_artefact
from moe_tta.shape import RouterShape

SHAPE = RouterShape(
    layers=(1, 2, 3), num_hidden_layers=4, num_experts=8, top_k=2, k_max=2
)
SIZE = (3, 8)
ARRAYS = {
    "bias": np.linspace(-1, 1, 24, dtype=np.float32).reshape(SIZE),
    "scale": np.full(SIZE, 2, np.float32),
    "promote": np.eye(3, 8, dtype=bool),
    "demote": np.eye(3, 8, 3, dtype=bool),
}


def write(folder, arrays=ARRAYS):
    return save_artefact(
        folder, arrays, shape=SHAPE, name="calm", base_model="org/model"
    )


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "calm")
    return tmp_path / "calm"


def put(folder, data):
    """Replace the tensors file and make the card's hash fit."""
    (folder / "steer.safetensors").write_bytes(data)
    edit_card(folder, sha256=hashlib.sha256(data).hexdigest())


def edit_card(folder, **changes):
    card = json.loads((folder / "config.json").read_text())
    card.update(changes)
    (folder / "config.json").write_text(json.dumps(card))


def test_round_trip(folder):
    artefact = load_artefact(str(folder))
    assert artefact.arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert artefact.arrays[name].dtype == array.dtype
        assert np.array_equal(artefact.arrays[name], array)
    assert artefact.card.layers == [1, 2, 3]
    assert artefact.card.created_by.startswith("moe-tta ")
    artefact.check(SHAPE)


def test_the_difference_to_another_model_is_named(folder):
    artefact = load_artefact(folder)
    other = dataclasses.replace(SHAPE, layers=(0, 1, 2), num_experts=16)
    with pytest.raises(ArtefactError) as caught:
        artefact.check(other)
    assert "layers [1, 2, 3] != [0, 1, 2]; num_experts 8 != 16" in str(caught.value)
    artefact.check(dataclasses.replace(SHAPE, top_k=3, k_max=4))


def nothing(folder):
    (folder / "config.json").unlink()


def no_tensors(folder):
    (folder / "steer.safetensors").unlink()


def a_folder_for_a_file(folder):
    no_tensors(folder)
    (folder / "steer.safetensors").mkdir()


def truncated(folder):
    source = folder / "steer.safetensors"
    source.write_bytes(source.read_bytes()[:-9])


def truncated_with_hash(folder):
    put(folder, (folder / "steer.safetensors").read_bytes()[:-9])


def empty_file(folder):
    put(folder, b"")


def a_pickle(folder):
    put(folder, pickle.dumps(ARRAYS))


def huge_header(folder):
    put(folder, (2**60).to_bytes(8, "little") + b"{}")


def wrong_hash(folder):
    edit_card(folder, sha256="0" * 64)


def broken_card(folder):
    (folder / "config.json").write_text('{"format": ')


def binary_card(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")


def foreign_card(folder):
    (folder / "config.json").write_text('{"architectures": ["MixtralForCausalLM"]}')


def later_format(folder):
    edit_card(folder, format="moe-tta-steer-2")


def unknown_field(folder):
    edit_card(folder, extra=1)


def float_size(folder):
    edit_card(folder, num_experts=8.0)


def wrong_shape(folder):
    put(folder, save({"bias": np.zeros((3, 9), np.float32)}))


def wrong_dtype(folder):
    put(folder, save({"bias": np.zeros(SIZE, np.float64)}))


def bfloat16(folder):
    header = {"bias": {"dtype": "BF16", "shape": [3, 8], "data_offsets": [0, 48]}}
    text = json.dumps(header).encode()
    put(folder, len(text).to_bytes(8, "little") + text + bytes(48))


def unknown_array(folder):
    put(folder, save({"biass": np.zeros(SIZE, np.float32)}))


def no_array(folder):
    put(folder, save({}))


def not_finite(folder):
    put(folder, save({"bias": np.full(SIZE, np.nan, np.float32)}))


def negative_scale(folder):
    put(folder, save({"scale": np.full(SIZE, -1, np.float32)}))


def both_ways(folder):
    put(folder, save({"promote": np.ones(SIZE, bool), "demote": np.ones(SIZE, bool)}))


FAULTS = {
    nothing: "config.json: cannot be read: No such file",
    no_tensors: "steer.safetensors: cannot be read: No such file",
    a_folder_for_a_file: "cannot be read: Is a directory",
    truncated: "the file was damaged or changed",
    truncated_with_hash: "unreadable as safetensors",
    empty_file: "unreadable as safetensors",
    a_pickle: "unreadable as safetensors",
    huge_header: "unreadable as safetensors",
    wrong_hash: "sha256 is",
    broken_card: "config.json: card: Invalid JSON",
    binary_card: "config.json: card: Invalid JSON",
    foreign_card: "config.json: name: Field required",
    later_format: "config.json: format: Input should be 'moe-tta-steer-1'",
    unknown_field: "config.json: extra: Extra inputs are not permitted",
    float_size: "config.json: num_experts: Input should be a valid integer",
    wrong_shape: "bias is float32 (3, 9), expected float32 (3, 8)",
    wrong_dtype: "bias is float64 (3, 8), expected float32 (3, 8)",
    bfloat16: "numpy has no dtype 'BF16'",
    unknown_array: "unknown array 'biass'",
    no_array: "holds no array",
    not_finite: "bias holds values that are not finite",
    negative_scale: "scale holds a negative factor",
    both_ways: "an expert is both promoted and demoted",
}


@pytest.mark.parametrize(
    ("fault", "words"), FAULTS.items(), ids=[f.__name__ for f in FAULTS]
)
def test_faults_are_clear_errors(folder, fault, words):
    fault(folder)
    with pytest.raises(ArtefactError) as caught:
        load_artefact(folder)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"bias": np.zeros((2, 8), np.float32)},
        {"bias": np.zeros(SIZE)},
        {"target": np.zeros(SIZE, np.float32)},
        {"scale": np.full(SIZE, np.inf, np.float32)},
    ],
)
def test_bad_arrays_are_not_saved(tmp_path, arrays):
    with pytest.raises(ArtefactError):
        write(tmp_path / "calm", arrays)
    assert not (tmp_path / "calm").exists()
