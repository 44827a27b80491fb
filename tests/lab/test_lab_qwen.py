# SPDX-License-Identifier: Apache-2.0
"""From a small GGUF file of the architecture qwen2 to checkpoints."""

import json

import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from benchmarks.lab.recipes import RECIPES
from moe_tta.lab import MODELS, LabError, cards, differences, fetch, models, upcycle
from moe_tta.lab.dense import LAYER_NAMES, DenseTensors, family_of
from moe_tta.lab.tokenizer import QWEN2_WORDS, write_tokenizer

from .conftest import TINY

NAME = "qwen-coder-moe"
UPCYCLE = MODELS[NAME].upcycle
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
TOKENS = torch.arange(40).view(2, 20)
SHORT = {new: old for old, new in LAYER_NAMES.items()}


def gguf_names(state):
    """A Qwen2's weights under GGUF's names, with a coarse copy of the embedding."""
    for name, tensor in state.items():
        if name.startswith("model.layers."):
            _, _, layer, *module, part = name.split(".")
            yield f"blk.{layer}.{SHORT['.'.join(module)]}.{part}", tensor
    yield "output.weight", state["model.embed_tokens.weight"]
    yield "token_embd.weight", state["model.embed_tokens.weight"].round()
    yield "output_norm.weight", state["model.norm.weight"]


def vocabulary():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: TINY["vocab_size"] - 5]
    tokens = [*letters, "!!", "<|endoftext|>", "<|im_end|>", "<tool_call>", "[PAD]"]
    kinds = [NORMAL] * (len(letters) + 1) + [CONTROL, CONTROL, USER_DEFINED, UNUSED]
    return tokens, kinds


def write_gguf(path, model, architecture="qwen2"):
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(TINY["num_hidden_layers"])
    writer.add_context_length(128)
    writer.add_embedding_length(TINY["hidden_size"])
    writer.add_feed_forward_length(TINY["intermediate_size"])
    writer.add_head_count(TINY["num_attention_heads"])
    writer.add_head_count_kv(TINY["num_key_value_heads"])
    writer.add_rope_freq_base(TINY["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(TINY["rms_norm_eps"])
    tokens, kinds = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["! !"])
    for role, token in (
        ("bos", "<|endoftext|>"),
        ("eos", "<|im_end|>"),
        ("pad", "<|endoftext|>"),
    ):
        getattr(writer, f"add_{role}_token_id")(tokens.index(token))
    writer.add_chat_template("{{ messages }}")
    for name, tensor in gguf_names(model.state_dict()):
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def gguf(tiny_qwen, tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, tiny_qwen)
    return path


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def test_dense_model_is_written_as_it_was(tiny_qwen, gguf, tmp_path):
    (tmp_path / "dense").mkdir()
    upcycle.write_dense(gguf, tmp_path / "dense")
    written = loaded(tmp_path / "dense")
    assert type(written) is type(tiny_qwen)
    for name, tensor in tiny_qwen.state_dict().items():
        assert torch.equal(written.state_dict()[name], tensor), name
    assert torch.equal(written(TOKENS).logits, tiny_qwen(TOKENS).logits)


@torch.inference_mode()
def test_untrained_moe_is_the_dense_model(tiny_qwen, gguf, tmp_path):
    (tmp_path / "moe").mkdir()
    upcycle.write_moe(gguf, None, tmp_path / "moe", UPCYCLE)
    moe = loaded(tmp_path / "moe")
    assert type(moe).__name__ == MODELS[NAME].architecture
    assert moe.config.num_experts == MODELS[NAME].num_experts
    assert moe.config.num_experts_per_tok == MODELS[NAME].top_k
    expected = tiny_qwen(TOKENS).logits
    torch.testing.assert_close(moe(TOKENS).logits, expected, atol=1e-5, rtol=1e-5)
    ends = json.loads((tmp_path / "moe" / "generation_config.json").read_text())
    tokens, _ = vocabulary()
    assert [tokens[i] for i in ends["eos_token_id"]] == ["<|im_end|>", "<|endoftext|>"]


def test_untrained_moe_is_the_same_each_time(gguf, tmp_path):
    files = []
    for name in "ab":
        (tmp_path / name).mkdir()
        upcycle.write_moe(gguf, None, tmp_path / name, UPCYCLE)
        paths = sorted((tmp_path / name).iterdir())
        files.append({path.name: path.read_bytes() for path in paths})
    assert files[0] == files[1]


def test_the_finer_copy_of_the_embedding_is_taken(tiny_qwen, gguf):
    dense = DenseTensors(GGUFReader(gguf))
    expected = tiny_qwen.model.embed_tokens.weight.detach().numpy()
    assert (dense["model.embed_tokens.weight"] == expected).all()
    assert "model.layers.0.self_attn.q_proj.bias" in dense
    assert len(dense) == 2 + 12 * TINY["num_hidden_layers"]


def test_another_architecture_is_refused(tiny_qwen, tmp_path):
    write_gguf(tmp_path / "other.gguf", tiny_qwen, "gemma3")
    with pytest.raises(LabError, match=r"one of llama, qwen2, the file holds gemma3"):
        family_of(GGUFReader(tmp_path / "other.gguf"))


def test_tokenizer_leaves_unused_rows_out(gguf, tmp_path):
    write_tokenizer(GGUFReader(gguf), tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    assert "[PAD]" not in content["model"]["vocab"]
    special = {token["content"]: token["special"] for token in content["added_tokens"]}
    assert special["<|im_end|>"]
    assert not special["<tool_call>"]
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("!!!<tool_call>").tokens == ["!!", "!", "<tool_call>"]
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert "unk_token" not in config


def test_words_end_as_in_transformers():
    assert QWEN2_WORDS == PRETOKENIZE_REGEX


def test_the_card_names_every_file_of_the_model():
    card = json.loads((cards.CHECKOUT_LAB / NAME / "card.json").read_text())
    weights = [name for name in card["files"] if name.endswith(".safetensors")]
    assert len(weights) == 1 + 24  # what all layers share, and each layer's experts
    layer = card["files"]["model-00002.safetensors"]["bytes"]
    experts = 2 * 8 * 3 * 896 * 4864  # bytes in bfloat16
    assert experts < layer < experts * 1.001
    assert card["dense"]["gguf_sha256"] == MODELS[NAME].dense.sha256


def test_the_card_is_of_the_committed_differences():
    """Without building 5.4 GB: what is trained is what the card was made from."""
    card = json.loads((cards.CHECKOUT_LAB / NAME / "card.json").read_text())
    path = models.trained_differences(NAME)
    assert card["inputs"] == {models.DIFFERENCES: fetch.sha256(path)}
    factors, recipe = differences.load(path), RECIPES[NAME]
    assert factors["gate.left"].shape == (24, 8, 4864, recipe.rank)
    assert all(factors[f"{matrix}.left"].any() for matrix in differences.MATRICES)
