# SPDX-License-Identifier: Apache-2.0
"""The fused head's loss against the plain one, on a CPU."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from moe_tta.adapter import head
from moe_tta.adapter.head import FusedHead

WIDTH, VOCAB = 24, 61


def make(count, dtype=torch.float64):
    """Return a linear map, rows, targets and factors of their losses."""
    generator = torch.Generator().manual_seed(count)
    linear = nn.Linear(WIDTH, VOCAB, bias=False, dtype=dtype).requires_grad_(False)
    linear.weight.data = torch.randn(VOCAB, WIDTH, generator=generator).to(dtype)
    rows = torch.randn(count, WIDTH, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCAB, (count,), generator=generator)
    factors = torch.randn(count, generator=generator).to(torch.float64)
    return linear, rows, targets, factors


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 30])
def test_equals_cross_entropy_in_float64(monkeypatch, count):
    monkeypatch.setattr(head, "CHUNK", 8)
    linear, rows, targets, factors = make(count)
    want = functional.cross_entropy(linear(rows), targets, reduction="none")
    found = FusedHead(linear).nll(rows, targets)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, want, rtol=1e-13, atol=1e-13)
    slopes = [torch.autograd.grad(x, rows, factors)[0] for x in (found, want)]
    torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-12)


def test_bfloat16_is_as_near_as_the_plain_loss():
    """Both from float64's; the plain loss takes its logits to float32."""
    linear, rows, targets, factors = make(200, torch.bfloat16)
    leaf = rows.detach().double().requires_grad_()
    exact = functional.linear(leaf, linear.weight.double())
    truth = functional.cross_entropy(exact, targets, reduction="none")
    plain = functional.cross_entropy(linear(rows).float(), targets, reduction="none")
    found = FusedHead(linear).nll(rows, targets)
    assert found.dtype == torch.float32
    missed = []
    (want,) = torch.autograd.grad(truth, leaf, factors)
    for values in (found, plain):
        (slope,) = torch.autograd.grad(values, rows, factors.float())
        assert slope.dtype == torch.bfloat16
        errors = values - truth, slope - want
        missed.append([float(error.detach().norm()) for error in errors])
    for ours, theirs in zip(*missed, strict=True):
        assert 0 < ours <= 1.5 * theirs


def test_backward_twice_gives_the_same(monkeypatch):
    monkeypatch.setattr(head, "CHUNK", 4)
    linear, rows, targets, factors = make(10)
    found = FusedHead(linear).nll(rows, targets)
    first = torch.autograd.grad(found, rows, factors, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(found, rows, factors)[0])


class _Products(TorchDispatchMode):
    """Counts products, and bytes of the largest tensor that is made."""

    def __init__(self, old):
        super().__init__()
        self.old = [tensor.untyped_storage().data_ptr() for tensor in old]
        self.products, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func.overloadpacket is torch.ops.aten.mm
        made = func(*args, **(kwargs or {}))
        storage = made.untyped_storage() if isinstance(made, torch.Tensor) else None
        if storage is not None and storage.data_ptr() not in self.old:
            self.largest = max(self.largest, storage.nbytes())
        return made


@pytest.mark.parametrize("needed", [True, False])
def test_two_products_a_chunk_and_one_without_gradients(monkeypatch, needed):
    monkeypatch.setattr(head, "CHUNK", 8)
    monkeypatch.setattr(head, "_scorer", lambda device: lambda *scored: None)
    linear, rows, targets, factors = make(30)
    fused = FusedHead(linear)
    with _Products((linear.weight, rows)) as seen, torch.set_grad_enabled(needed):
        values = fused.nll(rows if needed else rows.detach(), targets)
        if needed:
            torch.autograd.grad(values, rows, factors)
    assert seen.products == 4 * (1 + needed)
    slopes = 30 * WIDTH if needed else 0
    assert seen.largest == max(8 * 64, slopes) * 8
