# SPDX-License-Identifier: Apache-2.0
"""The adapter on a GPU engine's own weights: views, likelihoods, gradients.

In float32 everything equals transformers on the same device. In bfloat16 nothing does,
transformers in bfloat16 included: what is asked is that the adapter, vLLM and
transformers stand equally far from float32, to a factor of two.

Three engines, about a minute on an H200.
"""

import logging

import pytest
import torch

from moe_tta.adapter.graphs import CudaCapture, Graphs, Passes
from moe_tta.adapter.grouped import GroupedExperts
from moe_tta.adapter.job import reroute
from moe_tta.adapter.rerouting import Outcome, Rerouting
from moe_tta.vllm_plugin.model_shape import UnsupportedModelError
from tests.gpu import adapter_checks as checks
from tests.gpu.test_isolation import GRAPHS
from tests.plugin.engine import engine

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device"
)
log = logging.getLogger(__name__)
ADAPTER = {"moe_tta": {"adapter": {"max_context": 100}}}
CASES = [("olmoe", "bfloat16"), ("qwen3_moe", "bfloat16"), ("qwen3_moe", "float32")]
EPS = torch.finfo(torch.float32).eps
# a logprob is a few units wide and passes some 16 sums in each of 4 layers
FLOAT32 = 16 * 4 * EPS * 12


@pytest.fixture(scope="module", autouse=True)
def _exact_products():
    """Triton's products of float32 keep float32: vLLM's experts use TF32 otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_F32_DEFAULT", "ieee")
        yield


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request, tiny_models):
    """One engine, its dtype, and transformers in float32 and in that dtype."""
    name, dtype = request.param
    path = tiny_models(name)
    options = {**GRAPHS, "dtype": dtype, "additional_config": ADAPTER}
    with engine(path, **options, enable_prefix_caching=False) as llm:
        device = checks.adapter_of(llm).device
        exact = checks.hf_model(path, torch.float32, device)
        rough = checks.hf_model(path, getattr(torch, dtype), device)
        yield llm, dtype, exact, rough


def test_weights_are_vllms_own(case):
    llm, dtype, *_ = case
    adapter = checks.adapter_of(llm)
    assert adapter.device.type == "cuda"
    assert adapter.dtype == getattr(torch, dtype)
    experts = adapter.layers[0].mlp.experts
    assert isinstance(experts, GroupedExperts) == (dtype == "bfloat16")
    checks.check_views(llm)


def test_likelihoods_are_vllms(case):
    llm, dtype, exact, _ = case
    adapter, ours, served = checks.adapter_of(llm), [], []
    for tokens in checks.draw_texts(12, 1):
        want = checks.hf_logprobs(exact, tokens)
        ours.append((checks.adapter_logprobs(adapter, tokens) - want).abs())
        served.append((checks.served_logprobs(llm, tokens) - want).abs())
    ours, served = torch.cat(ours), torch.cat(served)
    log.info(
        "%s: logprob errors: adapter mean %.1e max %.1e, vLLM mean %.1e max %.1e",
        *(dtype, ours.mean(), ours.max(), served.mean(), served.max()),
    )
    if dtype == "float32":
        assert max(ours.max(), served.max()) <= FLOAT32
    assert ours.mean() <= 2 * served.mean() + EPS


def test_gradients_are_transformers_own(case):
    llm, dtype, exact, rough = case
    adapter, missed = checks.adapter_of(llm), {"adapter": 0.0, "transformers": 0.0}
    norm = 0.0
    generator = torch.Generator().manual_seed(3)
    shape = (len(adapter.shape.layers), adapter.shape.num_experts)
    for tokens in checks.draw_texts(8, 2):
        delta = 0.3 * torch.randn(shape, generator=generator)
        want, slope = checks.hf_gradient(exact, tokens, delta)
        loss, found = checks.adapter_gradient(adapter, tokens, delta)
        if dtype == "float32":
            assert abs(loss - want) <= 1e-5 * want
            assert (found - slope).norm() <= 1e-5 * slope.norm()
        _, theirs = checks.hf_gradient(rough, tokens, delta)
        missed["adapter"] += float((found - slope).norm())
        missed["transformers"] += float((theirs - slope).norm())
        norm += float(slope.norm())
    shares = {name: error / norm for name, error in missed.items()}
    log.info("%s: errors of the gradient, relative to float32's: %s", dtype, shares)
    if dtype == "bfloat16":
        assert 0 < shares["adapter"] <= 2 * shares["transformers"]


def test_reordered_weights_are_refused(case, monkeypatch):
    """As if vLLM had chosen another kernel, whose layout shapes do not tell."""
    from moe_tta.vllm_plugin import compat
    from moe_tta.vllm_plugin.adapter_loading import load_services

    llm, *_ = case
    monkeypatch.setattr(compat, "is_triton_experts", lambda experts: False)
    with pytest.raises(UnsupportedModelError, match=r"TritonExperts .*moe-backend"):
        llm.apply_model(lambda model: load_services(llm.llm_engine.vllm_config, model))


class _Launched(Graphs):
    """Sizes as with graphs, and no graph."""

    def call(self, size, run, inputs):
        return run(*inputs)


def test_rounds_by_graphs_are_those_without(case, monkeypatch):
    """Bit for bit: the same kernels on the same sizes, and no sum in another order.

    Texts of other lengths are of one size: 128 rows, padded to 128 for attention.
    """
    llm, dtype, *_ = case
    adapter = checks.adapter_of(llm)
    if dtype == "float32":
        assert type(adapter.passes) is Passes
        return
    assert type(adapter.passes) is Graphs
    monkeypatch.setattr(adapter, "passes", Graphs(CudaCapture()))
    generator = torch.Generator().manual_seed(3)
    shape = 2, len(adapter.shape.layers), adapter.shape.num_experts
    for optimizer in ("adam", "spsa"):
        settings = Rerouting(optimizer=optimizer, steps=3, lr=0.05, pairs=2)
        # warm, captured, replayed twice
        for lengths in ((50, 61), (61, 40), (33, 64), (64, 64)):
            texts = [
                torch.randint(2, 256, (length,), generator=generator).tolist()
                for length in lengths
            ]
            start = 0.1 * torch.randn(shape, generator=generator)
            found = reroute(adapter, texts, start, settings)
            with monkeypatch.context() as patch:
                patch.setattr(adapter, "passes", _Launched(CudaCapture()))
                wanted = reroute(adapter, texts, start, settings)
            for ours, theirs in zip(found, wanted, strict=True):
                assert ours.outcome is theirs.outcome is Outcome.ADAPTED
                assert ours.layers == theirs.layers
                assert ours.losses == theirs.losses
                assert torch.equal(ours.delta, theirs.delta)
    assert len(adapter.passes) >= 2  # a step, a loss
