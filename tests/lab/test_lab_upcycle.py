# SPDX-License-Identifier: Apache-2.0

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.lab import low_rank
from moe_tta.lab import differences, upcycle
from moe_tta.lab.architectures import MIXTRAL, QWEN2_MOE
from moe_tta.lab.checkpoint import save_parts, save_whole
from moe_tta.lab.neutral import neutral_factors

from .conftest import TINY

EXPERTS = 8
TOP_K = 2
TOKENS = torch.arange(40).view(2, 20)


@pytest.fixture(params=["mixtral", "qwen2_moe"])
def pair(request):
    """A dense model and the architecture that it is upcycled to."""
    name, architecture = {
        "mixtral": ("tiny_llama", MIXTRAL),
        "qwen2_moe": ("tiny_qwen", QWEN2_MOE),
    }[request.param]
    return request.getfixturevalue(name), architecture


def weights(model):
    state = model.state_dict()
    return {n: t.clone().numpy() for n, t in state.items() if n != "lm_head.weight"}


def tensors_of(dense, factors, architecture):
    parts = upcycle.upcycled_parts(dense, factors, architecture)
    return {name: tensor for part in parts for name, tensor in part.items()}


def built(dense, factors, architecture, folder, save=save_whole):
    """Builds a model as the lab does and loads it in float32."""
    save(upcycle.upcycled_parts(dense, factors, architecture), folder)
    config = architecture.config_json(TINY, EXPERTS, TOP_K)
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(model).__name__ == architecture.name
    return model.eval()


def random_factors(model, share, size):
    blocks = low_rank.upcycle(model, EXPERTS, 4, share)
    for block in blocks:
        block.router.data = (block.router.data * 4).bfloat16().float()
        for factor in block.factors.values():
            factor.data = torch.randn_like(factor) * size
    return blocks


def rounding_bound(mlp, x):
    """How far two float32 evaluations of a gated FFN may lie apart, [tokens, hidden].

    A dot product of n terms errs by at most n u times the product of the magnitudes
    (Higham 2002, section 3.1), u = 2**-24; the slope of SiLU stays below 1.1. The
    routing weights of two equal experts, quotients of a sum, add to one within 4 u.
    """
    unit = 2.0**-24
    gate, up, down = (
        getattr(mlp, f"{name}_proj").weight for name in differences.MATRICES
    )
    a, b = x @ gate.T, x @ up.T
    inner = torch.nn.functional.silu(a) * b
    hidden_error = x.shape[-1] * unit * (x.abs() @ gate.abs().T)
    up_error = x.shape[-1] * unit * (x.abs() @ up.abs().T)
    inner_error = 1.1 * hidden_error * b.abs() + a.abs() * up_error
    inner_error += 4 * unit * inner.abs()
    size = inner.abs() @ down.abs().T
    error = inner_error @ down.abs().T + inner.shape[-1] * unit * size
    return 2 * error + 4 * TOP_K * unit * size


@torch.inference_mode()
def test_untrained_blocks_are_the_dense_ffns(pair, tmp_path):
    model, architecture = pair
    factors = neutral_factors(TINY, EXPERTS)
    moe = built(weights(model), factors, architecture, tmp_path)
    x = torch.randn(1, 64, TINY["hidden_size"]) * 3
    for dense, sparse in zip(model.model.layers, moe.model.layers, strict=True):
        found, expected = sparse.mlp(x), dense.mlp(x)
        assert expected.abs().mean() > 0.1
        assert ((found - expected).abs() <= rounding_bound(dense.mlp, x)).all()


@torch.inference_mode()
def test_untrained_model_is_the_dense_one(pair, tmp_path):
    model, architecture = pair
    factors = neutral_factors(TINY, EXPERTS)
    moe = built(weights(model), factors, architecture, tmp_path)
    expected = model(TOKENS).logits
    torch.testing.assert_close(moe(TOKENS).logits, expected, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_untrained_routers_choose_every_expert(tiny_qwen, tmp_path):
    factors = neutral_factors(TINY, EXPERTS)
    x = torch.randn(512, TINY["hidden_size"])
    for router in factors["router"].float():
        chosen = (x @ router.T).topk(TOP_K).indices
        assert chosen.unique().numel() == EXPERTS


@torch.inference_mode()
def test_a_file_per_layer_is_the_same_model(tiny_qwen, tmp_path):
    dense = weights(tiny_qwen)
    factors = low_rank.export(random_factors(tiny_qwen, False, 0.3))
    logits = []
    for save in (save_whole, save_parts):
        folder = tmp_path / save.__name__
        folder.mkdir()
        moe = built(dense, factors, QWEN2_MOE, folder, save)
        logits.append(moe(TOKENS).logits)
    assert torch.equal(*logits)
    layers = TINY["num_hidden_layers"]
    assert len(list((tmp_path / "save_parts").glob("*.safetensors"))) == 1 + layers


@pytest.mark.parametrize("share", [True, False])
@torch.inference_mode()
def test_zero_differences_leave_the_dense_model(pair, tmp_path, share):
    model, architecture = pair
    expected, dense = model(TOKENS).logits, weights(model)
    blocks = random_factors(model, share, 0.0)
    moe = built(dense, low_rank.export(blocks), architecture, tmp_path)
    torch.testing.assert_close(moe(TOKENS).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("share", [True, False])
@torch.inference_mode()
def test_built_model_is_the_trained_one(pair, tmp_path, share):
    model, architecture = pair
    dense_logits, dense = model(TOKENS).logits, weights(model)
    # small enough that no token is sent elsewhere by rounding alone
    blocks = random_factors(model, share, 0.1)
    moe = built(dense, low_rank.export(blocks), architecture, tmp_path)
    trained, served = model(TOKENS).logits, moe(TOKENS).logits
    changed = (trained - dense_logits).abs().mean()
    # What is left is the rounding of factors to int8 and of weights to bfloat16.
    assert (trained - served).abs().mean() < 0.03 * changed


def test_experts_are_dense_plus_difference(pair):
    model, architecture = pair
    dense = weights(model)
    factors = low_rank.export(random_factors(model, False, 0.3))
    tensors = tensors_of(dense, factors, architecture)
    for matrix, short in architecture.matrices.items():
        parts = [factors[f"{matrix}.{p}"][1] for p in ("left", "right", "scale")]
        left, right, scale = (part.float() for part in parts)
        base = torch.from_numpy(dense[f"model.layers.1.mlp.{matrix}_proj.weight"])
        expected = base + left[5] @ right[5] * scale[5]
        block = f"model.layers.1.{architecture.block}"
        found = tensors[f"{block}.experts.5.{short}.weight"]
        assert torch.equal(found, expected.bfloat16())


def test_exported_router_is_stored_as_served(tiny_llama):
    blocks = random_factors(tiny_llama, True, 0.3)
    router = low_rank.export(blocks)["router"]
    assert router.dtype == torch.bfloat16
    assert torch.equal(router[1].float(), blocks[1].router)


def test_even_load_has_unit_balance_loss():
    x, router = torch.randn(64, 32), torch.zeros(EXPERTS, 32)
    dense = {m: torch.zeros(4, 32) for m in ("gate", "up")}
    dense["down"] = torch.zeros(32, 4)
    factors = {
        f"{m}.{side}": torch.zeros(1, *shape)
        for m, w in dense.items()
        for side, shape in (("left", (w.shape[0], 2)), ("right", (2, w.shape[1])))
    }
    _, balance = low_rank.moe_ffn(x, router, dense, factors, 2)
    assert balance == pytest.approx(1.0)


def test_saved_differences_load_unchanged(tiny_llama, tmp_path):
    factors = low_rank.export(random_factors(tiny_llama, True, 0.3))
    differences.save(tmp_path / "d.safetensors", factors)
    loaded = differences.load(tmp_path / "d.safetensors")
    assert loaded.keys() == factors.keys()
    assert all(torch.equal(loaded[name], factors[name]) for name in factors)
