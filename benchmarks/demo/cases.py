# SPDX-License-Identifier: Apache-2.0
"""The demo's requests, and what must come of each."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

import moe_tta
from benchmarks.demo.store import NAME
from benchmarks.demo.traces import Routing
from moe_tta.client import Request
from moe_tta.shape import RouterShape
from moe_tta.strategies.remix.neighbours import LAST_LAYERS

K_MAX = 4
PRESET = "thrifty"


@dataclass(frozen=True)
class Case:
    """One request.

    Attributes:
        name: In the table.
        request: Its routing parameters, `None` for none.
        expected: What the trace must show, in words.
        holds: Whether it does.
        refused: The parameter that the server must name with HTTP 400.
    """

    name: str
    request: Request | None
    expected: str = ""
    holds: Callable[[Routing], bool] = lambda routing: True
    refused: str | None = None


def settings(
    shape: RouterShape, trace_dir: str, store: str | None, adapted: bool
) -> dict:
    """What an operator passes by --additional-config, under `moe_tta`."""
    return {
        "allow_inline": True,
        "k_max": k_max(shape),
        "presets": {PRESET: {"dynamic_k": {"k": 1, "span": "generated"}}},
        "stores": {} if store is None else {NAME: store},
        "trace_dir": trace_dir,
        "adapter": {} if adapted else None,
    }


def k_max(shape: RouterShape) -> int:
    return max(K_MAX, shape.top_k)


def middle(shape: RouterShape) -> list[int]:
    """The middle half of the MoE layers, those that the demo steers."""
    count = len(shape.layers)
    return list(shape.layers[count // 4 : count - count // 4])


def cases(shape: RouterShape, adapted: bool) -> list[Case]:
    """Return the requests; adapted ones only where the adapter knows the model."""
    ask = moe_tta.request
    promoted, demoted = 0, shape.num_experts - 1
    rows = [shape.layers.index(layer) for layer in middle(shape)]
    steer = {
        "promote": [[layer, promoted] for layer in middle(shape)],
        "demote": [[layer, demoted] for layer in middle(shape)],
    }
    wide = k_max(shape)
    return [
        Case("plain", None, "the model's own choice", _plain(shape.top_k)),
        Case(
            f"steer: +{promoted} -{demoted}, {len(rows)} layers",
            ask(steer=steer),
            "the promoted experts always, the demoted never",
            lambda r: bool(
                r.shares[rows, promoted].min() == 1
                and r.shares[rows, demoted].max() == 0
            ),
        ),
        Case("dynamic_k: k=1", ask(dynamic_k={"k": 1}), "1 expert", _always(1)),
        Case("dynamic_k: k=4", ask(dynamic_k={"k": 4}), "4 experts", _always(4)),
        Case(
            "dynamic_k: p=0.5",
            ask(dynamic_k={"p": 0.5}),
            f"1 to {wide} experts, not always the same number",
            lambda r: 1 < r.experts_per_token < wide,
        ),
        Case(
            f"preset: {PRESET}",
            ask(preset=PRESET),
            "1 expert for generated tokens only",
            lambda r: 1 < r.experts_per_token < shape.top_k,
        ),
        *([_remix(shape)] if shape.is_distribution else []),
        *([_reroute()] if adapted else []),
        Case(
            "contrast: weak rank 2",
            ask(contrast={"weak": {"rank": 2}}),
            "the model's own choice; the weak stream is hidden",
            _plain(shape.top_k),
        ),
        Case(
            "steer: no such expert",
            ask(steer={"promote": [[shape.layers[0], shape.num_experts]]}),
            refused="moe_tta.steer.promote[0]",
        ),
    ]


def _remix(shape: RouterShape) -> Case:
    """The pathway of the nearest solved question, in the last layers of one token."""
    changed = len(shape.layers) - LAST_LAYERS
    return Case(
        "remix: 1 solved neighbour",
        moe_tta.request(remix={"store": NAME, "k": 1, "floor": -1.0}),
        "one token's experts changed, in the last layers",
        lambda r: bool(
            r.changed.any(axis=1).sum() == 1 and not r.changed[:, :changed].any()
        ),
    )


def _reroute() -> Case:
    """One round on the prompt: its vectors hold from its last token on."""
    return Case(
        "reroute: 2 steps on the prompt",
        moe_tta.request(reroute={"every": 0, "steps": 2, "lr": 0.5}),
        "other experts, but not for the first token",
        lambda r: bool(r.changed.any() and not r.changed[0].any()),
    )


def _plain(top_k: int) -> Callable[[Routing], bool]:
    return lambda r: r.changed_choices == 0 and _always(top_k)(r)


def _always(count: int) -> Callable[[Routing], bool]:
    return lambda r: bool(np.all(r.used.sum(axis=2) == count))
