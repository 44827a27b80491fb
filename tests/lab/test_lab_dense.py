# SPDX-License-Identifier: Apache-2.0

import json

import numpy as np
import pytest
from gguf import GGUFReader
from tokenizers import Tokenizer

from moe_tta.lab.dense import DenseTensors, base_config, unpermute
from moe_tta.lab.tokenizer import write_tokenizer


def permute(weight, num_heads):
    """What llama.cpp's convert_hf_to_gguf.py does to q and k."""
    half = weight.shape[0] // num_heads // 2
    halves = weight.reshape(num_heads, 2, half, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def reader(gguf):
    return GGUFReader(gguf)


@pytest.fixture(scope="module")
def tokenizer(reader, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(reader, folder)
    return folder


def test_unpermute_undoes_permute():
    weight = np.arange(24 * 5).reshape(24, 5)
    assert np.array_equal(unpermute(permute(weight, 3), 3), weight)


def test_q4_1_is_dequantised_as_its_definition_says(reader):
    tensor = next(t for t in reader.tensors if t.name == "blk.0.ffn_gate.weight")
    # A block of 32 weights: scale and minimum in float16, then 16 bytes of nibbles.
    block = tensor.data[7].reshape(-1, 20)[3]
    scale, minimum = block[:4].view(np.float16).astype(np.float32)
    nibbles = np.concatenate([block[4:] & 15, block[4:] >> 4])
    expected = nibbles.astype(np.float32) * scale + minimum
    found = DenseTensors(reader)["model.layers.0.mlp.gate_proj.weight"]
    assert np.array_equal(found[7, 96:128], expected)


def test_every_tensor_has_the_shape_the_config_says(reader):
    tensors, config = DenseTensors(reader), base_config(reader)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    assert len(tensors) == 2 + 9 * config["num_hidden_layers"]
    prefix = "model.layers.29"
    assert tensors[f"{prefix}.self_attn.k_proj.weight"].shape == (keys, hidden)
    assert tensors[f"{prefix}.mlp.down_proj.weight"].shape == (hidden, inner)
    assert tensors["model.embed_tokens.weight"].shape == (config["vocab_size"], hidden)


@pytest.mark.parametrize(
    "text", ["In 1999, isn't it?", "def f(x):\n\treturn x**2", "été, 日本, Привет"]
)
def test_tokenizer_round_trip(tokenizer, text):
    loaded = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    assert loaded.decode(loaded.encode(text).ids) == text


def test_digits_are_single_tokens(tokenizer):
    loaded = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    assert loaded.encode("12345").tokens == list("12345")


def test_special_tokens_and_chat_template(tokenizer):
    loaded = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    assert loaded.encode("<|im_start|>user<|im_end|>").ids[0] == 1
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "<|im_end|>"
    assert "add_generation_prompt" in config["chat_template"]
