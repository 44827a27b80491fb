# SPDX-License-Identifier: Apache-2.0
"""A server goes on with other requests while it embeds one request's text."""

import asyncio
import threading
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from moe_tta.remix.card import ModelCard
from moe_tta.remix.checkpoint import weights_hash
from moe_tta.remix.embed import MINILM
from moe_tta.vllm_plugin.model_shape import shape_from_config
from tests.remix.making import made_store

TEXT = "Once upon a time there was a fox."


@pytest.fixture(scope="module")
def options(lab, tmp_path_factory):
    model = lab("olmoe-fine")
    shape = shape_from_config(AutoConfig.from_pretrained(model))
    weights = weights_hash(Path(model))
    card = ModelCard.of(shape, name="lab", weights=weights, dtype="float32")
    pathways = np.eye(shape.num_experts)[None, : len(shape.layers)]
    folder = tmp_path_factory.mktemp("aside")
    store = made_store(folder, np.eye(1), pathways, card, embedder=MINILM)
    return AsyncEngineArgs(
        model=model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        additional_config={"moe_tta": {"stores": {"solved": str(store.path)}}},
    )


async def tokens(llm, name, remix=None):
    extra = None if remix is None else {"moe_tta": {"remix": remix}}
    params = SamplingParams(
        temperature=0,
        max_tokens=8,
        extra_args=extra,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    # as vLLM's servers give a prompt to the engine
    ids = llm.get_tokenizer().encode(TEXT)
    prompt = {"type": "token", "prompt_token_ids": ids}
    async for output in llm.generate(prompt, params, name):
        final = output
    return list(final.outputs[0].token_ids)


class SlowEmbedder:
    """The real one, which waits to be let go."""

    def __init__(self, embedder):
        self.card, self._inner = embedder.card, embedder.embed
        self.entered, self.go = threading.Event(), threading.Event()

    def embed(self, text):
        self.entered.set()
        assert self.go.wait(120), "nobody else was served meanwhile"
        self.text = text
        return self._inner(text)


async def scenario(llm):
    stores = llm.input_processor.moe_tta.context.stores
    served = stores["solved"]
    asked = {"store": "solved", "floor": -1.0}
    quick = await tokens(llm, "quick", asked)
    plain = await tokens(llm, "plain", None)
    slow = SlowEmbedder(served.embedder)
    object.__setattr__(served, "embedder", slow)
    waiting = asyncio.create_task(tokens(llm, "slow", asked))
    await asyncio.to_thread(slow.entered.wait, 120)
    assert await tokens(llm, "other") == plain
    assert not waiting.done()
    slow.go.set()
    assert await waiting == quick != plain
    assert slow.text == TEXT
    with pytest.raises(VLLMValidationError, match="did you mean 'solved'"):
        await tokens(llm, "wrong", {"store": "solvd"})
    with pytest.raises(VLLMValidationError, match=r"expected 1\.\.1"):
        await tokens(llm, "many", {**asked, "k": 9})


def test_others_are_served_meanwhile(options):
    async def run():
        llm = AsyncLLM.from_engine_args(options)
        try:
            await scenario(llm)
        finally:
            llm.shutdown()

    asyncio.run(run())
