# SPDX-License-Identifier: Apache-2.0
"""A tokenizer made offline, for servers of models that come without one."""

from __future__ import annotations

import shutil
from pathlib import Path

from benchmarks.overhead.models import Model


def servable(model: Model, scratch: Path) -> Path:
    """Return a folder a server can load: the model's own if it has a tokenizer.

    Otherwise `scratch` gets its config and a tokenizer of one word for each token of
    the vocabulary, in which any ids survive decoding and encoding.
    """
    if (model.folder / "tokenizer.json").is_file():
        return model.folder
    if model.load_format != "dummy":
        for weights in model.folder.glob("*.safetensors*"):
            (scratch / weights.name).symlink_to(weights)
    shutil.copy(model.folder / "config.json", scratch)
    _words(model.config.vocab_size).save_pretrained(scratch)
    return scratch


def _words(size: int):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # special tokens match inside words, so theirs must not begin another
    vocabulary = {"<unk>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, size)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>"
    )
