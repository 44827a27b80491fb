# SPDX-License-Identifier: Apache-2.0
"""SmolLM2's tokenizer files, made from the metadata of its GGUF file.

The JSON is written here rather than by the tokenizers library, so that its bytes,
and so its hash, do not depend on the library's version.
"""

import json
from pathlib import Path

from gguf import GGUFReader

from moe_tta.lab.dense import field
from moe_tta.lab.errors import LabError

CONTROL = 3  # gguf.TokenType.CONTROL


def write_json(path: Path, content: dict) -> None:
    """Writes JSON with the same bytes on every machine."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")


def _added_token(index: int, token: str) -> dict:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": token, **flags, "special": True}


def _byte_level(use_regex: bool) -> dict:
    flags = {"add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}
    return {"type": "ByteLevel", **flags}


def tokenizer_json(reader: GGUFReader) -> dict:
    """The content of tokenizer.json.

    The pre-tokenizer splits digits one by one and then as GPT-2 does: the one that
    llama.cpp calls "smollm".

    Raises:
        LabError: the file names another pre-tokenizer.
    """
    pre = field(reader, "tokenizer.ggml.pre")
    if pre != "smollm":
        raise LabError(f"expected the pre-tokenizer smollm, found {pre}")
    tokens = field(reader, "tokenizer.ggml.tokens")
    types = field(reader, "tokenizer.ggml.token_type")
    added = [
        _added_token(i, token)
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind == CONTROL
    ]
    unused = "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"
    model = {
        "type": "BPE",
        **dict.fromkeys(unused),
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": field(reader, "tokenizer.ggml.merges"),
    }
    splits = [{"type": "Digits", "individual_digits": True}, _byte_level(True)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits},
        "post_processor": None,
        "decoder": _byte_level(True),
        "model": model,
    }


def write_tokenizer(reader: GGUFReader, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json with the chat template."""
    tokens = field(reader, "tokenizer.ggml.tokens")

    def token(name: str) -> str:
        return tokens[field(reader, f"tokenizer.ggml.{name}_token_id")]

    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": field(reader, "llama.context_length"),
        "clean_up_tokenization_spaces": False,
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "unk_token": token("unknown"),
        "pad_token": token("padding"),
        "chat_template": field(reader, "tokenizer.chat_template"),
    }
    write_json(folder / "tokenizer.json", tokenizer_json(reader))
    write_json(folder / "tokenizer_config.json", config)
