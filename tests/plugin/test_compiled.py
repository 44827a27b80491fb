# SPDX-License-Identifier: Apache-2.0
"""torch.compile: plans fire in compiled code, and go when the request goes."""

from tests.plugin.engine import engine, generate, sampling
from tests.plugin.stock import run_stock

PROMPTS = [list(range(2 + i, 40 + 3 * i)) for i in range(4)]
PLANS = [
    None,
    {"dynamic_k": {"k": 1}},
    {"steer": {"bias": [[1, 3, 4.0]]}},
    {"steer": {"demote": [[0, 0], [2, 5]], "span": "generated"}},
]
COMPILED = {"enforce_eager": False, "dtype": "float32"}


def test_compiled_engine_obeys_plans(tiny_models, tmp_path):
    model = tiny_models("mixtral")
    stock = run_stock(model, PROMPTS, {"tokens": 8}, tmp_path, engine=COMPILED)
    params = [sampling(8, plan) for plan in PLANS]
    with engine(model, dtype="float32") as llm:
        eager = generate(llm, PROMPTS, params)
    with engine(model, **COMPILED) as llm:
        plain = generate(llm, PROMPTS, [sampling(8)] * 4)
        planned = generate(llm, PROMPTS, params)
        again = generate(llm, PROMPTS, [sampling(8)] * 4)
    assert plain == stock
    assert again == stock
    assert [tokens for tokens, _ in planned] == [tokens for tokens, _ in eager]
    assert [a != b for a, b in zip(planned, plain, strict=True)] == [
        plan is not None for plan in PLANS
    ]
