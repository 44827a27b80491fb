# SPDX-License-Identifier: Apache-2.0
"""A dense model's tokenizer files, made from the metadata of its GGUF file.

The JSON is written here rather than by the tokenizers library, so that its bytes,
and so its hash, do not depend on the library's version.
"""

import json
from pathlib import Path

from gguf import GGUFReader

from moe_tta.lab.dense import field, model_field
from moe_tta.lab.errors import LabError

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # gguf.TokenType


def _byte_level(use_regex: bool) -> dict:
    flags = {"add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}
    return {"type": "ByteLevel", **flags}


def _split(pattern: str) -> dict:
    regex = {"pattern": {"Regex": pattern}}
    return {"type": "Split", **regex, "behavior": "Isolated", "invert": False}


# how words end, from the tokenizer.json of Qwen2.5
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Normaliser and pre-tokenisers, by the name that llama.cpp gives to the latter.
SPLITTING = {
    # digits one by one, then as GPT-2 does
    "smollm": (
        None,
        [{"type": "Digits", "individual_digits": True}, _byte_level(True)],
    ),
    "qwen2": ({"type": "NFC"}, [_split(QWEN2_WORDS), _byte_level(False)]),
}


def write_json(path: Path, content: dict) -> None:
    """Writes JSON with the same bytes on every machine."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")


def _added_token(index: int, token: str, kind: int) -> dict:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": token, **flags, "special": kind == CONTROL}


def _used_tokens(reader: GGUFReader) -> dict[str, tuple[int, int]]:
    """Index and kind of each token but those that only fill the embedding up."""
    tokens = field(reader, "tokenizer.ggml.tokens")
    kinds = field(reader, "tokenizer.ggml.token_type")
    return {
        token: (i, kind)
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind != UNUSED
    }


def tokenizer_json(reader: GGUFReader) -> dict:
    """The content of tokenizer.json.

    Raises:
        LabError: the file names a pre-tokenizer that is not in `SPLITTING`.
    """
    pre = field(reader, "tokenizer.ggml.pre")
    if pre not in SPLITTING:
        expected = ", ".join(SPLITTING)
        raise LabError(f"expected one of the pre-tokenizers {expected}, found {pre}")
    normalizer, splits = SPLITTING[pre]
    tokens = _used_tokens(reader)
    added = [
        _added_token(i, token, kind)
        for token, (i, kind) in tokens.items()
        if kind in (CONTROL, USER_DEFINED)
    ]
    unused = "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"
    model = {
        "type": "BPE",
        **dict.fromkeys(unused),
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": {token: i for token, (i, _) in tokens.items()},
        "merges": field(reader, "tokenizer.ggml.merges"),
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits},
        "post_processor": None,
        "decoder": _byte_level(True),
        "model": model,
    }


def write_tokenizer(reader: GGUFReader, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json with the chat template."""
    tokens = field(reader, "tokenizer.ggml.tokens")
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {role: f"tokenizer.ggml.{name}_token_id" for role, name in roles.items()}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model_field(reader, "context_length"),
        "clean_up_tokenization_spaces": False,
        **{
            f"{role}_token": tokens[field(reader, key)]
            for role, key in ids.items()
            if key in reader.fields
        },
        "chat_template": field(reader, "tokenizer.chat_template"),
    }
    write_json(folder / "tokenizer.json", tokenizer_json(reader))
    write_json(folder / "tokenizer_config.json", config)
