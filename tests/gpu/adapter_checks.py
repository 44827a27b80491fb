# SPDX-License-Identifier: Apache-2.0
"""What must hold of an adapter built on the weights of a running GPU engine."""

import gc
import random

import torch
from transformers import AutoModelForCausalLM

from moe_tta.adapter import AdapterModel
from moe_tta.adapter.descent import autograd_gradient
from moe_tta.adapter.packing import PackedTexts
from moe_tta.adapter.survey import survey
from moe_tta.adapter.tail import Tail
from tests.adapter import independent
from tests.plugin.engine import sampling

BLOCK = 512  # bytes: CUDA's caching allocator rounds up to it


def state_of(llm):
    """Return what the plugin holds in the worker, which is in this process."""
    [state] = llm.collective_rpc(lambda worker: worker.model_runner.moe_tta)
    return state


def adapter_of(llm):
    """Return the adapter that serves the engine's requests."""
    return state_of(llm).rounds._services["reroute"]._model


def draw_texts(count, seed, least=40, most=60):
    rng = random.Random(seed)
    return [
        [rng.randrange(2, 256) for _ in range(rng.randrange(least, most))]
        for _ in range(count)
    ]


def snapshot(llm):
    """Return a copy of every parameter of the served model."""
    [found] = llm.apply_model(
        lambda model: {name: p.detach().clone() for name, p in model.named_parameters()}
    )
    return found


def changed(llm, before):
    """Return the names of parameters whose bits are not those of a snapshot."""
    after = snapshot(llm)
    assert after.keys() == before.keys()
    return [name for name in before if not _same_bits(before[name], after[name])]


def _same_bits(one, other):
    one, other = (t.reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(one, other)


def check_views(llm):
    """Every weight lies inside one of vLLM's parameters; building takes no more."""

    def inspect(model):
        owned = dict(model.named_parameters())
        spans = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in owned.values()]
        config = llm.llm_engine.vllm_config.model_config.hf_text_config
        gc.collect()
        torch.accelerator.synchronize()
        before = torch.cuda.memory_allocated()
        built = AdapterModel.from_served(config, owned)
        gc.collect()
        return spans, built, torch.cuda.memory_allocated() - before

    [(spans, built, more)] = llm.apply_model(inspect)
    for adapter in (built, adapter_of(llm)):
        total = 0
        for name, weight in adapter.weights():
            first, end = weight.data_ptr(), weight.data_ptr() + weight.nbytes
            assert any(a <= first and end <= b for a, b in spans), name
            assert not weight.requires_grad
            total += weight.nbytes
        assert total > 2**19
    # rotary frequencies, and transformers' second copy of them
    assert more <= 2 * BLOCK


def hf_model(path, dtype, device):
    """Return transformers' own model, which shares nothing with the adapter."""
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, experts_implementation="eager"
    )
    return model.to(device).eval().requires_grad_(False)


@torch.no_grad()
def adapter_logprobs(adapter, tokens):
    """Return log P of each token after the first, by the adapter's unedited model."""
    hidden = adapter.embed(torch.tensor([tokens], device=adapter.device))
    positions = torch.arange(len(tokens), device=adapter.device)[None]
    shared = adapter.shared(hidden, positions, None)
    hidden = adapter.run(hidden, range(len(adapter.layers)), shared, {})
    return _of_tokens(adapter.lm.lm_head(adapter.lm.model.norm(hidden))[0], tokens)


@torch.no_grad()
def hf_logprobs(model, tokens):
    """Return the same by transformers' model."""
    ids = torch.tensor([tokens], device=model.device)
    return _of_tokens(model(ids).logits[0], tokens)


def served_logprobs(llm, tokens):
    """Return the same by vLLM, as prompt logprobs."""
    [output] = llm.generate(
        [{"prompt_token_ids": tokens}],
        sampling(1, prompt_logprobs=0),
        use_tqdm=False,
    )
    rows = zip(output.prompt_logprobs[1:], tokens[1:], strict=True)
    return torch.tensor([row[token].logprob for row, token in rows])


def _of_tokens(logits, tokens):
    chosen = torch.tensor(tokens[1:], device=logits.device)[:, None]
    return logits[:-1].float().log_softmax(1).gather(1, chosen)[:, 0].cpu()


def adapter_gradient(adapter, tokens, delta):
    """Return loss and gradient [L, E] of one text at vectors [L, E], on the CPU."""
    texts = PackedTexts.of([tokens], adapter.device)
    point = delta[None].to(adapter.device)
    hidden = survey(adapter, texts, point).inputs[0]
    tail = Tail(adapter, texts, hidden, 0, 0)
    loss, slope = autograd_gradient(tail.loss)(point)
    return loss[0].cpu(), slope[0].cpu()


def hf_gradient(model, tokens, delta):
    """Return the same by hooks at transformers' gates, on the model's device."""
    with model.device:
        found = independent.context_gradient(model, tokens, delta.to(model.device))
    return tuple(part.float().cpu() for part in found)
