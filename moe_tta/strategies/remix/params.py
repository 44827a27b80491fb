# SPDX-License-Identifier: Apache-2.0
"""Parameters of remix."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, Strict, model_validator
from pydantic_core import PydanticCustomError

from moe_tta.remix.lookup import MAX_NEIGHBOURS
from moe_tta.remix.weights import KERNELS
from moe_tta.strategies.base import StrategyParams
from moe_tta.strategies.steer.params import layer_key

MAX_QUERY_CHARS = 1 << 16

Layer = Annotated[int, BeforeValidator(layer_key)]
Numbers = Annotated[tuple[float, ...], Strict(False), Field(min_length=1)]
Cosine = Annotated[float, Field(ge=-1, le=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, le=100)]

LOOK_UP = (
    *("k", "radius", "kernel", "bandwidth", "floor", "ceiling"),
    *("confidence", "update", "query", "vector"),
)
DESCENT = ("steps", "lr", "lr_end", "core")
SEARCHED = ("search_alpha", "ngd")  # on the neighbours' loss, by the adapter
MAX_STEPS = 64


class RemixParams(StrategyParams):
    """Either a `store` to look neighbours up in, or a `distribution`.

    Source: C3PO, arXiv 2504.07964; `confidence` from kNN-MoE, arXiv 2601.02144.

    Attributes:
        store: Name of an operator's reference store.
        k: Neighbours, the nearest; default 3, with `radius` the most there may be.
        radius: Greatest Euclidean distance of unit embeddings, 0..2, instead of k.
        kernel: How a neighbour's weight falls with its distance.
        bandwidth: Width of the kernels gaussian and matern, in units of distance;
            default the median distance of the neighbours.
        floor: Least cosine similarity of a neighbour. Without any, nothing is changed.
        ceiling: Greatest one: above it a reference counts as the question itself and
            is left out.
        alpha: Share that the token's own distribution keeps.
        confidence: Give the neighbours their mean similarity as share instead.
        update: What is made of the neighbours: the mean of their pathways, the best
            point between it and the token's own distribution, or the end of a gradient
            descent from there; the last two by the neighbours' loss, which needs the
            operator's setting `adapter`.
        steps: Of the descent.
        lr: Its first learning rate.
        lr_end: What a cosine lets it fall to.
        core: Experts of each layer that the descent may use.
        query: Text to look up; default the prompt.
        vector: The query's embedding, instead of a text.
        distribution: By layer, the distribution over experts to use, instead of a
            look-up; an edit of named experts.
        span: The prompt's last token, as the paper, or with all that is generated, as
            its released code.
        layers: First and last decoder layer; default the last five that there are.
    """

    store: str | None = None
    k: Annotated[int, Field(ge=1, le=MAX_NEIGHBOURS)] | None = None
    radius: Annotated[float, Field(ge=0, le=2)] | None = None
    kernel: Literal[KERNELS] = "gaussian"
    bandwidth: Annotated[float, Field(gt=0)] | None = None
    floor: Cosine = 0.0
    ceiling: Cosine = 1.0
    alpha: Share | None = None
    confidence: bool = False
    update: Literal["kernel_regression", "search_alpha", "ngd", "mode"] = (
        "kernel_regression"
    )
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] = 10
    lr: Rate = 1e-2
    lr_end: Rate = 1e-5
    core: Annotated[int, Field(ge=1)] = 20
    query: Annotated[str, Field(min_length=1, max_length=MAX_QUERY_CHARS)] | None = None
    vector: Numbers | None = None
    distribution: dict[Layer, Numbers] | None = None
    span: Literal["last_prompt", "last_prompt+generated"] = "last_prompt"

    @model_validator(mode="after")
    def _one_source(self) -> RemixParams:
        given = self.model_fields_set
        if (self.store is None) == (self.distribution is None):
            raise PydanticCustomError("source", "expected either store or distribution")
        for one, other in (
            ("query", "vector"),
            ("alpha", "confidence"),
            *(("distribution", name) for name in (*LOOK_UP, *DESCENT, "layers")),
        ):
            if one in given and other in given:
                raise PydanticCustomError(
                    "together",
                    "expected {one} or {other}, not both",
                    {"one": one, "other": other},
                )
        if self.in_rounds():
            fixed = {"alpha", "confidence"} & given
            if fixed:
                raise PydanticCustomError(
                    "searched",
                    "expected without {name}: {update} finds the share itself",
                    {"name": min(fixed), "update": self.update},
                )
        for name in DESCENT:
            if name in given and self.update != "ngd":
                raise PydanticCustomError(
                    "descent", "expected {name} with update ngd only", {"name": name}
                )
        return self

    def in_rounds(self) -> bool:
        """Whether the worker finds the distribution."""
        return self.update in SEARCHED

    def inline_edits(self) -> tuple[str, ...]:
        """Name the given members that edit experts without the operator's store."""
        return () if self.distribution is None else ("distribution",)
