# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from safetensors.torch import save_file
from transformers import MixtralConfig, MixtralForCausalLM

from benchmarks.lab import low_rank
from moe_tta.lab import differences, upcycle

from .conftest import TINY

EXPERTS = 8
TOKENS = torch.arange(40).view(2, 20)


def weights(llama):
    state = llama.state_dict()
    return {n: t.clone().numpy() for n, t in state.items() if n != "lm_head.weight"}


def built(dense, factors, folder):
    """Builds a Mixtral as the lab does and loads it in float32."""
    tensors = upcycle.upcycle(dense, factors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = upcycle.mixtral_config(TINY, EXPERTS, upcycle.TOP_K)
    MixtralConfig(**config).save_pretrained(folder)
    return MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def random_factors(llama, share, size):
    blocks = low_rank.upcycle(llama, EXPERTS, 4, share)
    for block in blocks:
        block.router.data = (block.router.data * 4).bfloat16().float()
        for factor in block.factors.values():
            factor.data = torch.randn_like(factor) * size
    return blocks


@pytest.mark.parametrize("share", [True, False])
@torch.inference_mode()
def test_zero_differences_leave_the_dense_model(tiny_llama, tmp_path, share):
    expected, dense = tiny_llama(TOKENS).logits, weights(tiny_llama)
    blocks = random_factors(tiny_llama, share, 0.0)
    mixtral = built(dense, low_rank.export(blocks), tmp_path)
    torch.testing.assert_close(mixtral(TOKENS).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("share", [True, False])
@torch.inference_mode()
def test_built_model_is_the_trained_one(tiny_llama, tmp_path, share):
    dense_logits, dense = tiny_llama(TOKENS).logits, weights(tiny_llama)
    blocks = random_factors(tiny_llama, share, 0.3)
    mixtral = built(dense, low_rank.export(blocks), tmp_path)
    trained, served = tiny_llama(TOKENS).logits, mixtral(TOKENS).logits
    changed = (trained - dense_logits).abs().mean()
    # What is left is the rounding of factors to int8 and of weights to bfloat16.
    assert (trained - served).abs().mean() < 0.03 * changed


def test_experts_are_dense_plus_difference(tiny_llama):
    dense = weights(tiny_llama)
    factors = low_rank.export(random_factors(tiny_llama, False, 0.3))
    tensors = upcycle.upcycle(dense, factors)
    names = {"gate": "w1", "up": "w3", "down": "w2"}
    for matrix, short in names.items():
        parts = [factors[f"{matrix}.{p}"][1] for p in ("left", "right", "scale")]
        left, right, scale = (part.float() for part in parts)
        base = torch.from_numpy(dense[f"model.layers.1.mlp.{matrix}_proj.weight"])
        expected = base + left[5] @ right[5] * scale[5]
        found = tensors[f"model.layers.1.block_sparse_moe.experts.5.{short}.weight"]
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
