# SPDX-License-Identifier: Apache-2.0
"""Plans that depend on the prompt are compiled beside a server's event loop.

Embedding a text and looking it up take milliseconds, in which the loop would serve
nobody. One thread does it: tokenizers cannot be shared between threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from moe_tta.deferred import DeferredRequest
from moe_tta.errors import RequestError
from moe_tta.vllm_plugin import compat

if TYPE_CHECKING:
    from moe_tta.compiled import CompiledRequest
    from moe_tta.vllm_plugin.admission import Admission
    from moe_tta.vllm_plugin.texts import PromptReader

# of the request that this task is adding
compiled_aside: ContextVar[CompiledRequest | None] = ContextVar(
    "compiled_aside", default=None
)


class Aside:
    """Compiles requests in a thread of its own.

    Args:
        admission: Of the server.
        read: Makes a prompt of its tokens.
    """

    def __init__(self, admission: Admission, read: PromptReader):
        self._admission = admission
        self._read = read
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="moe-tta-aside")

    async def compile(self, prompt: Any, params: Any) -> CompiledRequest | None:
        """Compile a request whose plans need its prompt; `None` for all others.

        Args:
            prompt: As vLLM's engine is given it; only token ids are read here.
            params: vLLM's parameters, not changed.

        Raises:
            VLLMValidationError: as admission does.
        """
        token_ids = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
        if token_ids is None or not self._admission.settings.stores:
            return None
        asked = self._admission.compile(params, resumable=False)
        if not isinstance(asked, DeferredRequest):
            return None
        whole = self._read(token_ids)
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._thread, asked.compile, self._admission.context, whole
            )
        except RequestError as err:
            raise compat.request_error(err) from None


def add_aside(original: Callable) -> Callable:
    """Compile first, then let `AsyncLLM` add the request."""

    async def add_request(self, request_id, prompt, params, *args, **kwargs):
        compiled = await self.moe_tta_aside.compile(prompt, params)
        token = compiled_aside.set(compiled)
        try:
            return await original(self, request_id, prompt, params, *args, **kwargs)
        finally:
            compiled_aside.reset(token)

    return add_request
