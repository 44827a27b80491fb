# SPDX-License-Identifier: Apache-2.0
"""Passes by graphs, without a GPU: a capture here is a pass on inputs of its own."""

import pytest
import torch

from moe_tta.adapter import AdapterModel, Rerouting
from moe_tta.adapter.graphs import Graphs, Passes, Size
from moe_tta.adapter.job import reroute
from tests.adapter.test_gradient import size


class Captures:
    """Captures passes as a graph would: other values count only if copied in."""

    def __init__(self):
        self.made = self.replayed = 0

    def __call__(self, run, inputs):
        self.made += 1
        own = tuple(tensor.clone() for tensor in inputs)
        kept = run(*own)

        def replay(given):
            self.replayed += 1
            for mine, tensor in zip(own, given, strict=True):
                mine.copy_(tensor)
            for old, new in zip(kept, run(*own), strict=True):
                old.copy_(new)
            return kept

        return replay


A, B, C = (Size("pass", 1, 32, 32, first) for first in range(3))


def double(x):
    return (2 * x,)


def test_a_size_is_captured_when_it_comes_again():
    captures = Captures()
    graphs = Graphs(captures, capacity=2)
    for value in (1.0, 2.0, 3.0):
        (found,) = graphs.call(A, double, (torch.tensor(value),))
        assert found == 2 * value
    assert (captures.made, captures.replayed, len(graphs)) == (1, 2, 1)


def test_the_size_used_longest_ago_goes():
    captures = Captures()
    graphs = Graphs(captures, capacity=2)
    for one in (A, A, B, B, A, C, A):
        graphs.call(one, double, (torch.ones(2),))
    assert captures.made == 2  # C took the place of B, A stayed
    graphs.call(B, double, (torch.ones(2),))
    graphs.call(B, double, (torch.ones(2),))
    assert captures.made == 3


def test_memory_that_runs_out_lets_go_of_all():
    graphs = Graphs(Captures())

    def full(x):
        raise torch.OutOfMemoryError("full")

    for _ in range(2):
        graphs.call(A, double, (torch.ones(2),))
    with pytest.raises(torch.OutOfMemoryError):
        graphs.call(B, full, (torch.ones(2),))
    assert len(graphs) == 0


@pytest.mark.parametrize("optimizer", ["adam", "spsa"])
def test_rounds_by_graphs_are_rounds(tiny_models, draw, optimizer):
    """Three rounds of one size on texts of other lengths, each as without graphs.

    With graphs there are rows of nobody, which move float32's last bits.
    """
    plain = AdapterModel.from_checkpoint(tiny_models("olmoe"))
    graphed = AdapterModel.from_checkpoint(tiny_models("olmoe"))
    captures = Captures()
    graphed.passes = Graphs(captures)
    settings = Rerouting(steps=3, optimizer=optimizer, lr=0.02, layers=(1, 3), pairs=2)
    for lengths in ((20, 33), (70, 39), (31, 32)):
        texts = [draw.tokens(length) for length in lengths]
        start = 0.1 * draw.normal(2, *size(plain))
        wanted = reroute(plain, texts, start, settings)
        found = reroute(graphed, texts, start, settings)
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours.layers == theirs.layers
            assert ours.losses == pytest.approx(theirs.losses, rel=1e-5)
            torch.testing.assert_close(ours.delta, theirs.delta, rtol=0, atol=2e-4)
    # the last loss and, with gradients, the opening and the step
    assert captures.made == (3 if optimizer == "adam" else 1)
    assert captures.replayed > captures.made


def test_large_passes_run_as_they_are():
    captures = Captures()
    graphs = Graphs(captures, most_rows=64)
    for _ in range(3):
        graphs.call(Size("pass", 2, 33, 66), double, (torch.ones(2),))
    assert captures.made == 0
    assert graphs.starts(66, 48) == range(48)
    hidden = torch.ones(1, 66, 3)
    assert graphs.keep(hidden, 0) is hidden


def test_sizes_are_rounded_where_passes_are_small():
    graphs = Graphs(Captures(), most_rows=128)
    assert [graphs.extent([n]) for n in (20, 32, 33)] == [(32, 32), (32, 32), (64, 64)]
    assert graphs.extent([20, 70]) == (128, 128)
    assert graphs.extent([5, 6, 7]) == (128, 128)
    assert graphs.extent([70, 59]) == (129, 70)
    assert graphs.extent([129]) == (129, 129)
    assert Passes().extent([5, 9, 7]) == (21, 9)


def test_tails_begin_at_rounded_layers():
    graphs = Graphs(Captures())
    assert list(graphs.starts(32, 48)) == [0, 6, 12, 18, 24, 30, 36, 42]
    assert list(graphs.starts(32, 4)) == [0, 1, 2, 3]


def test_what_is_kept_has_one_room_for_all_sizes():
    graphs = Graphs(Captures(), most_rows=64)
    first = graphs.keep(torch.ones(1, 3, 2), 0)
    other = graphs.keep(2 * torch.ones(1, 3, 2), 1)
    assert first.tolist() == [[[1.0, 1.0]] * 3]
    second = graphs.keep(3 * torch.ones(1, 64, 2), 0)
    assert second.data_ptr() == first.data_ptr() != other.data_ptr()
    assert first.unique().item() == 3
    assert other.unique().item() == 2


def test_tails_begin_where_the_choice_wants_them(tiny_models, draw):
    """One text of several sizes that choose layers by themselves."""
    plain = AdapterModel.from_checkpoint(tiny_models("olmoe"))
    graphed = AdapterModel.from_checkpoint(tiny_models("olmoe"))
    graphed.passes = Graphs(Captures())
    settings = Rerouting(steps=2, lr=0.02, share=0.25)
    chosen = set()
    for length in (20, 31, 33, 20, 32, 50, 64, 9):
        text = draw.tokens(length)
        start = draw.normal(1, *size(plain))
        [wanted] = reroute(plain, [text], start, settings)
        [found] = reroute(graphed, [text], start, settings)
        assert found.layers == wanted.layers
        assert found.losses == pytest.approx(wanted.losses, rel=1e-5)
        chosen.add(found.layers)
    assert len(chosen) > 1
