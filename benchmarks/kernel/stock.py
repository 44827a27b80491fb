# SPDX-License-Identifier: Apache-2.0
"""vLLM's own `topk_softmax`, and whether rows of slot 0 equal it bit for bit."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

from moe_tta.kernels.reference import Routing
from moe_tta.kernels.route import route_triton
from moe_tta.kernels.scores import RoutingRule
from moe_tta.kernels.table import PlanTable
from moe_tta.shape import RouterShape

# the second row: no powers of two, and those not divisible by 64 take stock's other
# kernel, with a workspace
MODELS = (
    *((8, 2), (64, 8), (128, 8), (256, 8), (512, 10)),
    *((40, 8), (60, 4), (192, 8), (320, 8), (384, 8)),
)
DTYPES = (torch.bfloat16, torch.float32)
Stock = Callable[[torch.Tensor, int, bool], Routing]


class Finding(NamedTuple):
    """Rows of one launch that differ from stock in ids or in weights."""

    tokens: int
    experts: int
    top_k: int
    dtype: str
    renormalize: bool
    kind: str  # of rows, from `ROWS`
    ids: int
    weights: int


def find_stock() -> Stock | None:
    """Return vLLM's routing op, `None` where it cannot be had.

    With MOE_C=FILE.so in the environment the op comes from that library and vLLM is
    not imported.
    """
    library = os.environ.get("MOE_C")
    if library:
        torch.ops.load_library(library)
    else:
        try:
            import vllm._custom_ops  # noqa: F401
        except ImportError:
            return None
    if not hasattr(torch.ops._moe_C, "topk_softmax"):
        return None
    return _call_stock


def origin() -> str:
    """Say where the op that `find_stock` found came from."""
    library = os.environ.get("MOE_C")
    return Path(library).name if library else f"vllm {version('vllm')}"


def _call_stock(logits: torch.Tensor, top_k: int, renormalize: bool) -> Routing:
    size, device = (len(logits), top_k), logits.device
    weights = torch.empty(size, dtype=torch.float32, device=device)
    ids, sources = (
        torch.empty(size, dtype=torch.int32, device=device) for _ in range(2)
    )
    op = torch.ops._moe_C.topk_softmax.default
    args = (weights, ids, sources, logits, renormalize, None, None)
    op(*args[: len(op._schema.arguments)])  # older ones lack the last arguments
    return Routing(weights, ids)


def _ties(logits: torch.Tensor) -> None:
    logits.mul_(2).round_().div_(2)


def _equal(logits: torch.Tensor) -> None:
    logits.copy_(logits[:, :1].clone().expand_as(logits))


def _huge(logits: torch.Tensor) -> None:
    logits.copy_(logits.sign() * 80 + logits)


def _masked(logits: torch.Tensor) -> None:
    logits.masked_fill_(logits > 1, float("-inf"))
    logits[:, -1] = 0.5


def _nan(logits: torch.Tensor) -> None:
    logits[::2, logits.shape[1] // 3] = float("nan")
    logits[1::2] = float("nan")


def _infinite(logits: torch.Tensor) -> None:
    logits[::2, logits.shape[1] // 3] = float("inf")
    logits[1::2] = float("-inf")


# kind of rows -> what makes them of normal logits [T, E], in place
ROWS: dict[str, Callable[[torch.Tensor], None]] = {
    "normal": lambda logits: None,
    "ties": _ties,
    "equal": _equal,
    "huge": _huge,
    "masked": _masked,
    "nan": _nan,
    "infinite": _infinite,
}


def draw_rows(
    kind: str, tokens: int, experts: int, dtype: torch.dtype, device: str = "cuda"
) -> torch.Tensor:
    """Return logits [tokens, experts] of a kind in `ROWS`, always the same ones."""
    generator = torch.Generator(device).manual_seed(tokens * 1000 + experts)
    logits = torch.randn(tokens, experts, generator=generator, device=device) * 2
    ROWS[kind](logits)
    return logits.to(dtype)


def compare(
    stock: Stock, model: tuple[int, int], tokens: tuple[int, ...]
) -> Iterator[Finding]:
    """Route every kind of rows by slot 0 and by stock; count the rows that differ."""
    experts, top_k = model
    for dtype, renormalize in product(DTYPES, (False, True)):
        shape = RouterShape((0,), 1, experts, top_k, top_k, renormalize=renormalize)
        table, rule = PlanTable(shape, 1, "cuda"), RoutingRule.from_shape(shape)
        for count, kind in product(tokens, ROWS):
            logits = draw_rows(kind, count, experts, dtype)
            slots = torch.zeros(count, dtype=torch.int32, device="cuda")
            rows = logits, slots, slots.long()
            ours = route_triton(*rows, table.layer(0), rule, top_k, 0)
            theirs = stock(logits, top_k, renormalize)
            name = str(dtype).removeprefix("torch.")
            differ = differing_rows(ours, theirs)
            yield Finding(count, *model, name, renormalize, kind, *differ)


def differing_rows(ours: Routing, theirs: Routing) -> tuple[int, int]:
    """Return how many rows differ in ids, and in the bits of weights.

    Two NaN are equal whatever their bits: no reader tells them apart.
    """
    ids = ours.topk_ids != theirs.topk_ids
    mine, other = ours.topk_weights, theirs.topk_weights
    weights = mine.view(torch.int32) != other.view(torch.int32)
    weights &= ~(mine.isnan() & other.isnan())
    return int(ids.any(dim=1).sum()), int(weights.any(dim=1).sum())
