# SPDX-License-Identifier: Apache-2.0
"""knn on a GPU: its kernels equal the law, in graphs too, and so does an engine.

The kernels need one CUDA device; the engines vLLM 0.32.x too.
"""

import numpy as np
import pytest
import torch

from moe_tta.compile import compile_request
from moe_tta.kernels.packed_memory import StoredTokens, pack
from moe_tta.kernels.recall import LayerMemory, recall_rows
from moe_tta.kernels.reference import RoutingRule, route
from moe_tta.kernels.table import PlanTable
from moe_tta.plan import RoutingPlan
from moe_tta.remix.tokens import load_tokens
from moe_tta.spec import parse
from tests.kernels.cases import make_plan, make_shape
from tests.remix.tokens import made_tokens, random_layers, reference_model

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device"
)

E, H = 64, 2048
SHAPE = make_shape(num_experts=E, top_k=8, k_max=8)


def world(tokens, width=H, dtype=torch.bfloat16, most=64):
    """Return a plan table's layer, what kernels read and what the law reads."""
    generator = torch.Generator("cuda").manual_seed(tokens)
    keys = torch.randn(tokens, width, generator=generator, device="cuda") + 0.2
    keys /= keys.norm(dim=1, keepdim=True)
    values = torch.rand(tokens, E, generator=generator, device="cuda")
    table = PlanTable(SHAPE, 3, "cuda")
    counts = (8, 1, min(64, tokens))
    plans = {s: make_plan(memory=1, neighbours=n) for s, n in enumerate(counts, 1)}
    table.write(plans)
    wide = keys.double()
    law = LayerMemory(wide / wide.norm(dim=1, keepdim=True), values)
    return table.layer(0), StoredTokens(keys, values), law


def rows_of(count, seed, width=H, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, width, generator=generator) + 0.2
    slots = torch.randint(0, 4, (count,), generator=generator).int()
    asking = torch.zeros(1 + count, dtype=torch.int32)
    there = torch.nonzero(slots).flatten()
    asking[0], asking[1 : 1 + len(there)] = len(there), there
    return hidden.to("cuda", dtype), slots.cuda(), asking.cuda()


def assert_equal(found, want, slots):
    """The row's own bits; each cosine has a chance of 1e-10 to round otherwise."""
    asks = slots > 0
    assert torch.equal(found.mix[asks], want.mix[asks])
    assert torch.equal(found.target[asks], want.target[asks])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 63, 1000, 20_000])
@pytest.mark.parametrize("count", [1, 8, 65, 700])
def test_kernels_equal_the_law(tokens, count, dtype):
    from moe_tta.kernels.recall_triton import RecallKernel, RecallWorkspace

    layer, stored, law = world(tokens)
    hidden, slots, asking = rows_of(count, seed=count, dtype=dtype)
    space = RecallWorkspace(count, E, "cuda")
    kernel = RecallKernel(layer, pack([stored], "cuda"), space)
    for _ in range(2):
        found = kernel(hidden, slots, asking)
    assert_equal(found, recall_rows(hidden, slots, layer, [law]), slots)


def test_a_captured_graph_follows_what_is_written_into_its_buffers():
    from moe_tta.kernels.recall_triton import RecallKernel, RecallWorkspace

    layer, stored, law = world(3000)
    buffers = rows_of(48, seed=0)
    space = RecallWorkspace(48, E, "cuda")
    kernel = RecallKernel(layer, pack([stored], "cuda"), space)
    kernel(*buffers)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kernel(*buffers)
    for seed in range(1, 6):
        for buffer, new in zip(buffers, rows_of(48, seed), strict=True):
            buffer.copy_(new)
        if seed == 3:  # a step in which no row asks writes nothing
            buffers[1].zero_()
            buffers[2].zero_()
            before = [part.clone() for part in found]
        graph.replay()
        if seed == 3:
            assert all(map(torch.equal, before, found))
            continue
        hidden, slots, _ = buffers
        assert_equal(found, recall_rows(hidden, slots, layer, [law]), slots)


EAGER = {
    "dtype": "float32",
    "max_model_len": 256,
    "gpu_memory_utilization": 0.1,
    "kv_cache_memory_bytes": 2**28,
    "enable_prefix_caching": False,
    "max_num_seqs": 8,
}
GRAPHS = EAGER | {
    "enforce_eager": False,
    "compilation_config": {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [1, 2, 4, 8],
    },
}
KNN = {"knn": {"store": "random", "k": 5}}
PROMPT = [5, 9, 30, 77, 12, 41, 8, 100, 3]


@pytest.fixture(scope="module")
def store(tiny_models, tmp_path_factory):
    card = reference_model(tiny_models("mixtral")).card
    layers = random_layers(np.random.default_rng(0), card, 200, 128)
    return made_tokens(tmp_path_factory.mktemp("knn") / "store", card, layers).path


def serving(tiny_models, store, options):
    from tests.plugin.engine import engine

    settings = {"moe_tta": {"stores": {"random": str(store)}, "k_max": 4}}
    return engine(tiny_models("mixtral"), **options, additional_config=settings)


def test_every_row_is_routed_by_the_law(tiny_models, store):
    """From what the engine's own routers were given, layer by layer."""
    from moe_tta.vllm_plugin.memories import Memories
    from tests.gpu.test_families import assert_law, prompt_calls

    with serving(tiny_models, store, EAGER) as llm:
        context = llm.llm_engine.input_processor.moe_tta.context
        calls = prompt_calls(llm, PROMPT, 4, KNN)
        own = prompt_calls(llm, PROMPT, 4)
    shape = context.shape
    plans = compile_request(parse(KNN, presets={}), context).plans
    assert len(set(map(id, plans))) == 1
    table = PlanTable(shape, 1, "cpu")
    table.write({1: plans[0] or RoutingPlan()})
    memories = Memories([(1, load_tokens(store))], shape, torch.device("cpu"))
    rule = RoutingRule.from_shape(shape)
    for call, plain in zip(calls, own, strict=True):
        rows = torch.arange(len(call.logits))
        slots, layer = torch.ones_like(rows), table.layer(call.layer)
        found = recall_rows(call.hidden, slots, layer, memories.layer(call.layer))
        assert (found.mix > 0).any()
        width = call.ids.shape[1]
        want = route(
            *(call.logits, slots, rows, layer, rule, width, call.layer), recalled=found
        )
        assert_law(call, want)
        assert not torch.equal(call.weights, plain.weights)


def test_graphs_give_what_eager_gives_and_neighbours_keep_their_bits(
    tiny_models, store
):
    """Batches of four, which the graphs hold unpadded; neighbours are stock vLLM's.

    The same kernels run in both: logprobs are apart by the float32 rounding of logits
    of a few units at most, should a library choose another order of sums.
    """
    from tests.plugin.engine import generate, sampling, status

    prompts = [[7 + i, *PROMPT] for i in range(4)]
    found = {}
    for name, options in (("eager", EAGER), ("graphs", GRAPHS)):
        with serving(tiny_models, store, options) as llm:
            assert status(llm)["token_stores"] == 1
            for kind, request in (("plain", None), ("knn", KNN)):
                asked = [sampling(12), sampling(12, request)] * 2
                found[name, kind] = generate(llm, prompts, asked)
    for name in ("eager", "graphs"):
        plain, knn = found[name, "plain"], found[name, "knn"]
        assert knn[0::2] == plain[0::2]
        assert all(map(lambda a, b: a[1] != b[1], knn[1::2], plain[1::2]))
    for got, want in zip(found["graphs", "knn"], found["eager", "knn"], strict=True):
        assert got[0] == want[0]
        assert got[1] == pytest.approx(want[1], abs=1e-4)
