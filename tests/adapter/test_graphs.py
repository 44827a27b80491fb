# SPDX-License-Identifier: Apache-2.0
"""Passes by graphs, without a GPU: a capture here is a pass on inputs of its own."""

import pytest
import torch

from moe_tta.adapter import AdapterModel, Rerouting
from moe_tta.adapter.graphs import Graphs
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


def double(x):
    return (2 * x,)


def test_a_size_is_captured_when_it_comes_again():
    captures = Captures()
    graphs = Graphs(captures, capacity=2)
    for value in (1.0, 2.0, 3.0):
        (found,) = graphs.call("a", double, (torch.tensor(value),))
        assert found == 2 * value
    assert (captures.made, captures.replayed, len(graphs)) == (1, 2, 1)


def test_the_size_used_longest_ago_goes():
    captures = Captures()
    graphs = Graphs(captures, capacity=2)
    for name in ("a", "a", "b", "b", "a", "c", "a"):
        graphs.call(name, double, (torch.ones(2),))
    assert captures.made == 2  # "c" took the place of "b", "a" stayed
    graphs.call("b", double, (torch.ones(2),))
    graphs.call("b", double, (torch.ones(2),))
    assert captures.made == 3


def test_memory_that_runs_out_lets_go_of_all():
    graphs = Graphs(Captures())

    def full(x):
        raise torch.OutOfMemoryError("full")

    for _ in range(2):
        graphs.call("a", double, (torch.ones(2),))
    with pytest.raises(torch.OutOfMemoryError):
        graphs.call("b", full, (torch.ones(2),))
    assert len(graphs) == 0


@pytest.mark.parametrize("optimizer", ["adam", "spsa"])
def test_rounds_by_graphs_are_rounds(tiny_models, draw, optimizer):
    """Three rounds of one size on other texts, each as without graphs.

    Texts are padded to 64 tokens with graphs, which moves float32's last bits.
    """
    plain = AdapterModel.from_checkpoint(tiny_models("olmoe"))
    graphed = AdapterModel.from_checkpoint(tiny_models("olmoe"))
    captures = Captures()
    graphed.passes = Graphs(captures)
    settings = Rerouting(steps=3, optimizer=optimizer, lr=0.02, layers=(1, 3), pairs=2)
    for _ in range(3):
        texts = [draw.tokens(20), draw.tokens(33)]
        start = 0.1 * draw.normal(2, *size(plain))
        wanted = reroute(plain, texts, start, settings)
        found = reroute(graphed, texts, start, settings)
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours.layers == theirs.layers
            assert ours.losses == pytest.approx(theirs.losses, rel=1e-5)
            torch.testing.assert_close(ours.delta, theirs.delta, rtol=0, atol=2e-4)
    # the survey, the last loss and, with gradients, the step
    assert captures.made == (3 if optimizer == "adam" else 2)
    assert captures.replayed > captures.made


def test_tails_begin_at_rounded_layers():
    graphs = Graphs(Captures())
    assert [graphs.lowest(layer, 48) for layer in (0, 5, 6, 47)] == [0, 0, 6, 42]
    assert [graphs.lowest(layer, 4) for layer in range(4)] == [0, 1, 2, 3]
