# SPDX-License-Identifier: Apache-2.0
"""In vLLM's own worker: names and layouts as assumed, rounds between steps."""

import pytest
import torch

from moe_tta.adapter import AdapterError, AdapterModel, Outcome, Rerouting, reroute
from tests.adapter.layouts import vllm_tensors
from tests.plugin.engine import engine, generate, sampling


def test_names_are_vllms_and_cpu_is_refused(tiny_models, family):
    path = tiny_models(family)
    with engine(path) as llm:
        [found] = llm.apply_model(lambda model: dict(model.named_parameters()))
        served = llm.llm_engine.vllm_config.model_config.hf_text_config
    config, assumed = vllm_tensors(path, vocab_padding=0)
    # vLLM edits the config it loads: it must still mean the same model
    one, other = (AdapterModel.from_served(c, assumed) for c in (config, served))
    assert one.shape == other.shape
    rotary = [model.lm.model.rotary_emb.inv_freq for model in (one, other)]
    assert torch.equal(*rotary)
    assert found.keys() == assumed.keys()
    for name, tensor in found.items():
        assert tensor.numel() in (0, assumed[name].numel()), name
    with pytest.raises(AdapterError, match="vLLM has freed"):
        AdapterModel.from_served(config, found)


def test_a_round_between_steps_changes_nothing_but_its_vectors(tiny_models):
    path = tiny_models("olmoe")
    prompt = list(range(5, 25))

    def adapt(model):
        with torch.inference_mode():
            adapter = AdapterModel.from_checkpoint(path)
            zeros = torch.zeros(1, 4, 64)
            return reroute(adapter, [prompt], zeros, Rerouting(steps=2))[0]

    with engine(path) as llm:
        before = generate(llm, [prompt], [sampling(6)])
        [done] = llm.apply_model(adapt)
        assert generate(llm, [prompt], [sampling(6)]) == before
    assert done.outcome is Outcome.ADAPTED
    assert done.losses[-1] < done.losses[0]
