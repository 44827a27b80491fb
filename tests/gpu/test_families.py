# SPDX-License-Identifier: Apache-2.0
"""On a GPU: the families arm, equal stock without a plan, and obey the law with one.

Needs vLLM 0.32.x and one CUDA device; two engines a family, eager.
"""

from dataclasses import replace

import pytest
import torch

from tests.families import CASES
from tests.kernels.cases import U
from tests.kernels.rounded_groups import check_rounded, rounds_scores
from tests.plugin.engine import engine, generate, sampling, status
from tests.plugin.spying import Oracle, Routed, runners, spied
from tests.plugin.stock import run_stocks
from tests.plugin.test_families import edited, per_expert, prompts

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device"
)
# the others are in test_v2_runner.py, under CUDA graphs
NEW = [c for c in CASES if c.name not in ("mixtral", "olmoe", "qwen3_moe")]
EAGER = {
    "dtype": "bfloat16",
    "gpu_memory_utilization": 0.1,
    "kv_cache_memory_bytes": 2**28,
    "enable_prefix_caching": False,  # a prompt's rows are counted
}
SAMPLING = {"tokens": 8, "logprobs": 5}


@pytest.fixture(scope="module")
def stock(request, tiny_models, tmp_path_factory):
    """What stock vLLM generates, by family: one process for all that are asked for."""
    asked = [getattr(item, "callspec", None) for item in request.session.items]
    named = {
        call.params["case"].name for call in asked if call and "case" in call.params
    }
    names = [case.name for case in NEW if case.name in named]
    folder = tmp_path_factory.mktemp("stock")
    models = [tiny_models(name) for name in names]
    found = run_stocks(models, prompts(), SAMPLING, folder, engine=EAGER)
    return dict(zip(names, found, strict=True))


def bounds(logits):
    """Return (rtol, atol) of a weight, for CUDA's fast exp and the fused sigmoid.

    exp: 2 + 1.16 |x| units in the last place (2 U each) at |x| <= 32, after z - logZ
    rounded as on CPU; the fused sigmoid is (tanh(x / 2) + 1) / 2, exact to 2 U of 1,
    and dividing by a sum of at least its largest score, 0.02 here, makes that 100 U.
    """
    assert logits.float().abs().max() <= 14
    return 80 * U + 56 * U, 100 * U


def dense(routing, logits):
    """Return weights [T, E]; skipped columns have id -1 and weight 0."""
    weights, ids = routing
    assert (weights[ids < 0] == 0).all()
    return per_expert(weights, ids.clamp_min(0), logits)


def assert_law(call, want):
    rtol, atol = bounds(call.logits)
    got, expected = (
        # logits in bfloat16 tie, and the last place may go to another of equal weight
        dense(routing, call.logits).sort(dim=1).values
        for routing in ((call.weights, call.ids), (want.topk_weights, want.topk_ids))
    )
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)


def assert_own(call, oracle):
    """Rows without a plan: vLLM's router, which may round scores to bfloat16."""
    if not rounds_scores(oracle.shape, call.logits):
        assert_law(call, oracle.own(call))
        return
    got, rule = dense((call.weights, call.ids), call.logits), oracle.rules[call.layer]
    assert check_rounded(got, call.logits, rule, bounds(call.logits)[0]) > 0.5


def prompt_calls(llm, prompt, num_layers, request=None):
    """Return each layer's routing of a prompt's rows; what follows is padding."""
    rows = len(prompt)
    with spied(llm) as calls:
        generate(llm, [prompt], [sampling(1, request)])
    calls = [call for call in calls if len(call.logits) >= rows]
    assert len(calls) == num_layers
    return [Routed(call.layer, *(part[:rows] for part in call[1:])) for call in calls]


@pytest.mark.parametrize("case", NEW, ids=lambda case: case.name)
def test_family(tiny_models, stock, case):
    model, (asked, *_) = tiny_models(case.name), prompts()
    shape = replace(case.shape, k_max=case.k_max)
    request = edited(shape)
    oracle = Oracle(model, shape, request)
    wide = {"additional_config": {"moe_tta": {"k_max": case.k_max}}}
    with engine(model, **EAGER, **wide) as llm:
        assert status(llm)["armed_layers"] == list(shape.layers)
        routers = {type(runner.router).__name__ for runner in runners(llm)}
        assert routers == {case.cuda_router}
        plain = generate(llm, prompts(), [sampling(**SAMPLING)] * len(prompts()))
        own = prompt_calls(llm, asked, len(shape.layers))
        planned = prompt_calls(llm, asked, len(shape.layers), request)
    assert plain == stock[case.name]
    for before, after in zip(own, planned, strict=True):
        assert_own(before, oracle)
        assert_law(after, oracle.planned(after))
    demoted = [
        dense((c.weights, c.ids), c.logits)[:, :6:2].sum() for c in (own[0], planned[0])
    ]
    assert demoted[1] < demoted[0] / 2
