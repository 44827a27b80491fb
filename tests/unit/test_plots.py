# SPDX-License-Identifier: Apache-2.0
"""Figures show the numbers they were given, on scales that start where they should."""

import numpy as np
import pytest

from moe_tta.plots import routing_heat_map

BEFORE = np.array([[0.5, 0.1, 0.4], [0.2, 0.8, 0.0]])
AFTER = np.array([[0.5, 0.5, 0.0], [0.2, 0.8, 0.0]])


def test_panels():
    figure = routing_heat_map(BEFORE, AFTER, [3, 5])
    images = [ax.images[0] for ax in figure.axes if ax.images]
    shown = [np.asarray(image.get_array()) for image in images]
    assert np.array_equal(shown[0], BEFORE)
    assert np.array_equal(shown[1], AFTER)
    assert np.array_equal(shown[2], AFTER - BEFORE)
    assert [image.get_clim() for image in images] == [(0, 0.8), (0, 0.8), (-0.4, 0.4)]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [
        "3",
        "5",
    ]


def test_equal_arrays_draw(tmp_path):
    zero = np.zeros((2, 3))
    routing_heat_map(zero, zero, [0, 1]).savefig(tmp_path / "zero.png")
    assert (tmp_path / "zero.png").stat().st_size > 0


@pytest.mark.parametrize("layers", [[0], [0, 1, 2]])
def test_shapes_must_agree(layers):
    with pytest.raises(ValueError, match="expected two arrays"):
        routing_heat_map(BEFORE, AFTER, layers)
