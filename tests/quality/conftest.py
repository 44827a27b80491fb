# SPDX-License-Identifier: Apache-2.0
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def byte_model(tiny_models, tmp_path_factory):
    """A tiny Mixtral of 256 tokens with a tokenizer of one token a byte."""
    folder = tmp_path_factory.mktemp("byte") / "tiny"
    shutil.copytree(tiny_models("mixtral"), folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=letters[1], bos_token=letters[0]
    ).save_pretrained(folder)
    return Path(folder)
