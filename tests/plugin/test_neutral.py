# SPDX-License-Identifier: Apache-2.0
"""With the plugin on and nothing asked, vLLM is stock vLLM, bit for bit."""

import random

import pytest

from tests.plugin.engine import engine, generate, sampling, status
from tests.plugin.stock import run_stock

SAMPLING = {"tokens": 24, "logprobs": 5}


def prompts(vocab, count=12):
    rng = random.Random(7)
    return [
        [rng.randrange(2, vocab) for _ in range(rng.randrange(4, 80))]
        for _ in range(count)
    ]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"])
def test_tiny_models(tiny_models, tmp_path, name, dtype):
    model = tiny_models(name)
    check(model, tmp_path, {"dtype": dtype}, vocab=256)


@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
def test_wider_selection(tiny_models, tmp_path, name):
    """Rows without a plan pay for a larger k_max with unused columns, not in values."""
    model = tiny_models(name)
    wide = {
        "additional_config": {"moe_tta": {"k_max": {"mixtral": 5, "olmoe": 14}[name]}}
    }
    check(model, tmp_path, {"dtype": "float32"}, vocab=256, plugin=wide)


@pytest.mark.parametrize("name", ["smollm2-moe", "olmoe-fine"])
def test_lab_models(lab, tmp_path, name):
    check(lab(name), tmp_path, {"dtype": "bfloat16"}, vocab=40000, count=6)


def check(model, tmp_path, options, vocab, plugin=None, count=12):
    asked = prompts(vocab, count)
    want = run_stock(model, asked, SAMPLING, tmp_path, engine=options)
    with engine(model, **options, **(plugin or {})) as llm:
        assert len(status(llm)["armed_layers"]) > 0
        plain = generate(llm, asked, [sampling(**SAMPLING)] * count)
        empty = generate(llm, asked, [sampling(**SAMPLING, moe_tta={})] * count)
    assert plain == want
    assert empty == want
