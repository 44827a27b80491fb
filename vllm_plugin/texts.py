# SPDX-License-Identifier: Apache-2.0
"""Text and tokens, as the engine's tokenizer turns one into the other."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from moe_tta.errors import RequestError
from moe_tta.spec import PARAMETER
from moe_tta.strategies import Prompt


class PromptReader:
    """Makes prompts that can be read as text.

    Args:
        processor: vLLM's input processor.
    """

    def __init__(self, processor: Any):
        self._processor = processor

    def __call__(self, token_ids: Sequence[int] | None) -> Prompt:
        """Return the prompt of a request; `None` is one of embeddings."""
        return Prompt(token_ids, self._decode, self._encode)

    @property
    def _tokenizer(self) -> Any:
        if self._processor.tokenizer is None:
            raise RequestError("this engine has no tokenizer", PARAMETER)
        return self._processor.tokenizer

    @cached_property
    def _own_tokenizer(self) -> Any:
        # vLLM's threads change theirs while they encode
        return copy.deepcopy(self._tokenizer)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def _encode(self, text: str) -> list[int]:
        return self._own_tokenizer.encode(text)
