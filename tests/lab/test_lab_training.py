# SPDX-License-Identifier: Apache-2.0

import json
import math
import sys
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from benchmarks.lab import low_rank, train
from benchmarks.lab.losses import token_losses, window_loss
from benchmarks.lab.mixture import mixed
from benchmarks.lab.recipes import RECIPES
from moe_tta.lab import MODELS, differences

NAME = "qwen-coder-moe"
MIXTURE = RECIPES[NAME].mixture
TOKENS = torch.arange(40).view(2, 20)


@pytest.mark.parametrize("chunk", [3, 64])
def test_losses_in_chunks_are_those_of_all_logits(chunk):
    torch.manual_seed(0)
    head, targets = torch.randn(50, 8), torch.randint(50, (17,))
    hidden = torch.randn(17, 8, requires_grad=True)
    teacher = torch.randn(17, 8)
    log_probs, wanted = (F.linear(x, head).log_softmax(-1) for x in (hidden, teacher))
    entropy = F.cross_entropy(F.linear(hidden, head), targets)
    divergence = (wanted.exp() * (wanted - log_probs)).sum(-1).mean()
    expected = torch.autograd.grad(entropy + 2 * divergence, hidden)[0]
    found = token_losses(head, hidden, targets, teacher, chunk)
    torch.testing.assert_close(found, torch.stack([entropy, divergence]))
    gradient = torch.autograd.grad(found[0] + 2 * found[1], hidden)[0]
    torch.testing.assert_close(gradient, expected)


def test_without_a_teacher_there_is_no_divergence():
    found = token_losses(torch.eye(4), torch.zeros(3, 4), torch.tensor([0, 1, 2]))
    assert found.tolist() == pytest.approx([math.log(4), 0.0])


@torch.inference_mode()
def test_a_model_with_trained_blocks_is_dense_when_asked(tiny_qwen):
    expected = tiny_qwen(TOKENS).logits
    blocks = low_rank.upcycle(tiny_qwen, 8, 2, share=False)
    for block in blocks:
        for factor in block.factors.values():
            factor.data.normal_()
    assert not torch.equal(tiny_qwen(TOKENS).logits, expected)
    with low_rank.as_dense(blocks):
        assert torch.equal(tiny_qwen(TOKENS).logits, expected)
    assert not torch.equal(tiny_qwen(TOKENS).logits, expected)


def test_every_domain_has_its_share():
    domains = torch.tensor([0] * 5 + [1] * 40 + [2] * 40)
    names = ["few", "many", "unused"]
    drawn = mixed(domains, names, {"few": 0.25, "many": 0.75}, 40, seed=0)
    counts = Counter(drawn.tolist())
    assert sum(counts[i] for i in range(5)) == 10
    assert {counts[i] for i in range(5)} == {2}  # two whole passes
    assert all(count == 1 for i, count in counts.items() if 5 <= i < 45)
    assert max(counts) < 45
    assert drawn.tolist() != sorted(drawn.tolist())


def test_a_domain_without_windows_is_named():
    with pytest.raises(ValueError, match="asks for absent"):
        mixed(torch.zeros(3), ["present"], {"absent": 1.0}, 4, seed=0)


@pytest.mark.parametrize("name", RECIPES)
def test_mixtures_are_shares(name):
    assert sum(RECIPES[name].mixture.values()) in (0, pytest.approx(1.0))
    assert MODELS[name].upcycle


def test_differences_stay_small_enough_to_commit(tmp_path):
    hidden, inner, layers, experts = 896, 4864, 24, MODELS[NAME].num_experts
    rank, tensors = RECIPES[NAME].rank, {}
    sizes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    for matrix, (out, into) in sizes.items():
        left = torch.zeros(layers, experts, out, rank)
        right = torch.zeros(layers, experts, rank, into)
        parts = differences.quantise(left, right)
        tensors |= {f"{matrix}.{part}": value for part, value in parts.items()}
    tensors["router"] = torch.zeros(layers, experts, hidden, dtype=torch.bfloat16)
    differences.save(tmp_path / "d.safetensors", tensors)
    assert not RECIPES[NAME].share
    assert (tmp_path / "d.safetensors").stat().st_size <= 12_000_000


@pytest.fixture
def trained(tiny_qwen, tmp_path, monkeypatch):
    """Runs the training script on a tiny model; its folder, by more options."""
    tiny_qwen.save_pretrained(tmp_path / "dense")
    count = len(MIXTURE)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(64, (3 * count, 24), generator=generator, dtype=torch.int32)
    windows = {
        "train": tokens,
        "train_domain": torch.arange(3 * count, dtype=torch.int32) % count,
        "validation": tokens[:4].clone(),
    }
    save_file(windows, tmp_path / "windows.safetensors")
    (tmp_path / "windows.json").write_text(json.dumps({name: {} for name in MIXTURE}))

    def run(name, *options):
        out = tmp_path / name
        paths = [*("--model", tmp_path / "dense"), *("--out", out)]
        paths += ["--windows", tmp_path / "windows.safetensors"]
        sizes = ["--steps", 3, "--batch", 8, "--rank", 2, "--log-every", 1]
        line = ["train", NAME, *paths, *sizes, *options]
        monkeypatch.setattr(sys, "argv", [str(word) for word in line])
        train.main()
        return out

    return run


def test_dry_run(trained):
    out = trained("whole")
    log = json.loads((out / "train_log.json").read_text())
    assert [entry["step"] for entry in log["curve"]] == [1, 2, 3]
    first = log["curve"][0]
    assert first["divergence"] == pytest.approx(0, abs=1e-3)  # the dense model yet
    assert log["curve"][-1]["divergence"] > first["divergence"]
    assert log["validation"]["divergence"] > 0
    assert log["model"] == NAME
    assert log["rank"] == 2
    factors = differences.load(out / "differences.safetensors")
    assert factors["router"].shape == (2, MODELS[NAME].num_experts, 32)
    assert factors["gate.left"].any()


def test_a_run_in_three_calls_is_the_same_run(trained, tmp_path):
    state = tmp_path / "state.safetensors"
    whole = trained("whole")
    for call in range(3):
        stopped = trained(f"call{call}", "--state", state, "--stop-after", 0)
    names = (whole, stopped)
    once, thrice = (load_file(f / "differences.safetensors") for f in names)
    assert all(torch.equal(once[name], thrice[name]) for name in once)
    curves = [json.loads((f / "train_log.json").read_text())["curve"] for f in names]
    steps = [[(e["step"], e["loss"]) for e in curve] for curve in curves]
    assert steps[0] == steps[1]


def test_training_lowers_the_loss(tiny_qwen):
    torch.manual_seed(0)
    blocks = low_rank.upcycle(tiny_qwen, 8, 4, share=False)
    parameters = [p for p in tiny_qwen.parameters() if p.requires_grad]
    assert {id(p) for p in parameters} == {
        id(p) for block in blocks for p in block.parameters()
    }
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = window_loss(tiny_qwen, TOKENS)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
