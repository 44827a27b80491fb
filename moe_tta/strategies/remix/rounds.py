# SPDX-License-Identifier: Apache-2.0
"""The round of remix's updates that lower the neighbours' loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_tta.errors import RequestError
from moe_tta.remix import updates
from moe_tta.remix.errors import StoreError
from moe_tta.remix.labelled import read_labelled, to_arguments
from moe_tta.remix.serving import ServedStore
from moe_tta.rounds import AskedRounds, Schedule, Work
from moe_tta.spans import span_segments
from moe_tta.strategies.base import PlanContext
from moe_tta.strategies.operator_stores import store_named
from moe_tta.strategies.remix.neighbours import borrow, covered_layers

if TYPE_CHECKING:
    from moe_tta.strategies.remix.params import RemixParams

# one pass over the prompt and the neighbours, then the search, which reads only the
# rows from each neighbour's last prompt token on, in the changed layers and above
PASSES = (1, 1)


def rounds(params: RemixParams, context: PlanContext) -> AskedRounds | None:
    """Say what the worker searches for; `None` where no reference is near.

    Source: C3PO, arXiv 2504.07964: kernel regression with alpha by search, and
    neighbourhood gradient descent.

    Raises:
        RequestError: the store cannot be read, or its neighbours are too long.
    """
    found = borrow(params, context)
    if found is None:
        return None
    store = store_named(params.store, context, ServedStore).store
    try:
        labelled = read_labelled(store, found, context.prompt.encode)
    except StoreError as err:
        raise RequestError(str(err), "store", params.store) from err
    except RequestError as err:
        raise RequestError(
            f"{err.message}, and {params.update} encodes texts", "update"
        ) from err
    tokens = sum(one.tokens for one in labelled)
    if tokens > context.adapter.max_context:
        raise RequestError(
            f"the neighbours have {tokens} tokens; this engine adapts to at most "
            f"{context.adapter.max_context} (adapter.max_context)",
            "k",
        )
    arguments = {
        "layers": covered_layers(params, context),
        "neighbours": to_arguments(labelled),
        "segments": list(span_segments(params.span)),
        "update": params.update,
        **_OF_UPDATE[params.update](params, found),
    }
    return AskedRounds(Work("remix", arguments, PASSES, tokens), Schedule(every=0))


def _descent(params: RemixParams, found: updates.Borrowed) -> dict[str, Any]:
    return {"descent": params.model_dump(include={"steps", "lr", "lr_end", "core"})}


def _line(params: RemixParams, found: updates.Borrowed) -> dict[str, Any]:
    return {"borrowed": updates.regress(found).tolist()}


_OF_UPDATE = {"ngd": _descent, "search_alpha": _line}
