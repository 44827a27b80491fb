# SPDX-License-Identifier: Apache-2.0
"""The contrast kernels against the law; `test_triton.py` runs this."""

import math

import pytest
import torch

from moe_tta.kernels.contrast import COMBINE, contrast_logits
from moe_tta.kernels.contrast_triton import (
    CHUNK,
    COMBINE_ROWS,
    OVERLAPPED_CHUNK,
    ContrastRows,
    can_overlap,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OVERLAPS = [False, True] if can_overlap(torch.device(DEVICE)) else [False]
EDGES = [CHUNK, OVERLAPPED_CHUNK] if True in OVERLAPS else [CHUNK]
VOCABS = [1, 7, *(n + d for n in EDGES for d in (-1, 0, 1)), 3 * CHUNK + 5]
LARGE = [1000, 50304, 128256, 151936, 256000] if DEVICE == "cuda" else [1000, 50304]
COUNTS = [1, 2, 7, 64] if DEVICE == "cuda" else [2]
DTYPES = [torch.float32, torch.bfloat16]
GUARD = 5  # columns and rows that belong to nobody


def draw(num_rows, vocab, dtype, seed):
    """Return [num_rows, vocab] logits inside a buffer of NaN, and the buffer.

    Among them are masked tokens, NaN and infinities.
    """
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.full((num_rows + 2 * GUARD, vocab + GUARD), math.nan, dtype=dtype)
    rows = buffer[GUARD:-GUARD, :vocab]
    rows.copy_(torch.randn(num_rows, vocab, generator=generator) * 5)
    odd = torch.rand(num_rows, vocab, generator=generator)
    rows[odd < 0.1] = -math.inf
    rows[odd > 0.97] = math.nan
    buffer = buffer.to(DEVICE)
    return buffer[GUARD:-GUARD, :vocab], buffer


def draw_pairs(pairs, num_rows):
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(1))
    beta = torch.tensor([0.0, 0.3, 0.5, 2.0, 10.0])
    alpha = torch.tensor([0.1, 0.0, 1.0, 0.5, 1e-30])
    some = torch.arange(pairs) % len(beta)
    given = order[:pairs], order[pairs : 2 * pairs], beta[some], alpha[some]
    return [tensor.to(DEVICE) for tensor in given]


def same_bits(got, want):
    """NaN equals NaN, whatever its bits."""
    return torch.equal(got.nan_to_num(7e30), want.nan_to_num(7e30)) and torch.equal(
        got.isnan(), want.isnan()
    )


def check(vocab, pairs, dtype, overlap):
    num_rows = 2 * pairs + 3
    logits, buffer = draw(num_rows, vocab, dtype, seed=vocab + pairs)
    given = draw_pairs(pairs, num_rows)
    leads, followers, *numbers = given
    combine = ContrastRows(pairs + 1, vocab, DEVICE, overlap)
    if dtype == torch.float32:
        out, out_buffer = logits, buffer
    else:
        out_buffer = buffer.float()
        out = out_buffer[GUARD:-GUARD, :vocab]
    want, read = out_buffer.clone(), buffer.clone()
    if pairs:
        rows = contrast_logits(logits[leads], logits[followers], *numbers)
        want[leads + GUARD, :vocab] = rows
    combine.check(logits, out, *given)
    combine(logits, out, *given)
    # the second call takes the compiled kernels; the same pairs the other way round
    assert same_bits(out_buffer, want)
    if dtype != torch.float32:
        assert same_bits(buffer, read)
        combine(logits, out, *given)
        assert same_bits(out_buffer, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("pairs", [0, 1, 5])
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_kernels_equal_the_law(vocab, pairs, dtype, overlap):
    check(vocab, pairs, dtype, overlap)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", LARGE)
@pytest.mark.parametrize("pairs", COUNTS)
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_real_vocabularies(vocab, pairs, dtype, overlap):
    check(vocab, pairs, dtype, overlap)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("pairs", [1, 8, 64, 200])
def test_neighbours_in_a_graph_are_waited_for(pairs, overlap):
    """A kernel writes the logits just before, another reads the result just after."""
    rounds, vocab, replays = 6, 50304, 20
    sources = [draw(2 * pairs, vocab, torch.float32, n)[0] for n in range(rounds)]
    leads = torch.arange(0, 2 * pairs, 2, device=DEVICE)
    numbers = torch.full((2, pairs), 0.5, device=DEVICE)
    given = leads, leads + 1, *numbers
    combine, logits = ContrastRows(pairs, vocab, DEVICE, overlap), sources[0].clone()
    results = [torch.empty_like(logits) for _ in sources]

    def run():
        for source, result in zip(sources, results, strict=True):
            logits.copy_(source)
            combine(logits, logits, *given)
            result.copy_(logits)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(replays):
        for result in results:
            result.fill_(7.0)
        graph.replay()
        for source, result in zip(sources, results, strict=True):
            want = source.clone()
            want[leads] = contrast_logits(source[leads], source[leads + 1], *numbers)
            assert same_bits(result, want)


@pytest.mark.parametrize(
    ("strong", "weak"),
    [
        ([3.0, -math.inf], [1.0, 2.0]),
        ([-math.inf, -math.inf], [1.0, 1.0]),
        ([math.inf, 2.0], [1.0, 1.0]),
        ([math.nan, math.nan], [1.0, 1.0]),
        ([3.0, 2.5], [math.nan, math.inf]),
        ([3.0, 2.5], [-math.inf, -math.inf]),
    ],
)
def test_rows_without_a_number_to_hold_on_to(strong, weak):
    logits = torch.tensor([weak, strong], device=DEVICE)
    one = torch.tensor([0.5], device=DEVICE)
    want = contrast_logits(logits[1:], logits[:1], one, one)
    rows = torch.tensor([1], device=DEVICE), torch.tensor([0], device=DEVICE)
    ContrastRows(1, 2, DEVICE)(logits, logits, *rows, one, one)
    assert torch.equal(logits[1:].nan_to_num(7), want.nan_to_num(7))


def test_equal_rows_and_beta_zero_are_the_strong_row():
    logits = draw(4, 50, torch.float32, seed=0)[0].nan_to_num(1.0)
    logits[1] = logits[0]
    before = logits.clone()
    rows = torch.tensor([0, 2], device=DEVICE), torch.tensor([1, 3], device=DEVICE)
    beta = torch.tensor([2.0, 0.0], device=DEVICE)
    combine = ContrastRows(2, 50, DEVICE)
    combine(logits, logits, *rows, beta, torch.zeros(2, device=DEVICE))
    assert torch.equal(logits, before)


def test_every_combination_has_kernels():
    assert COMBINE_ROWS.keys() == COMBINE.keys()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"out": torch.zeros(4, 8).bfloat16()}, "float32 out"),
        ({"logits": torch.zeros(4, 8).int()}, "float logits"),
        ({"logits": torch.zeros(8, 4).T}, "stride 1 along V"),
        ({"logits": torch.zeros(4, 9)}, r"expected logits \[N, 8\]"),
        ({"leads": torch.zeros(2, dtype=torch.int32)}, r"torch.int64 \[2\]"),
        ({"beta": torch.zeros(3)}, r"torch.float32 \[2\]"),
        ({"alpha": torch.zeros(2, 2)[:, 0]}, r"torch.float32 \[2\]"),
    ],
)
def test_wrong_inputs_are_named(change, words):
    given = {
        "logits": torch.zeros(4, 8),
        "out": torch.zeros(4, 8),
        "leads": torch.tensor([0, 1]),
        "followers": torch.tensor([2, 3]),
        "beta": torch.ones(2),
        "alpha": torch.ones(2),
    }
    combine = ContrastRows(2, 8, "cpu")
    combine.check(*given.values())
    with pytest.raises(ValueError, match=words):
        combine.check(*{**given, **change}.values())
    many = {name: tensor.repeat(2) for name, tensor in list(given.items())[2:]}
    with pytest.raises(ValueError, match=r"at most \[2\]"):
        combine.check(given["logits"], given["out"], *many.values())
