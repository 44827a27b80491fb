# SPDX-License-Identifier: Apache-2.0
"""The strategy contract: parameters in, a routing plan out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Strict
from pydantic_core import PydanticCustomError

from moe_tta.errors import RequestError, show
from moe_tta.spans import Span

if TYPE_CHECKING:
    from moe_tta.artefact import Artefact
    from moe_tta.plan import RoutingPlan
    from moe_tta.remix.errors import StoreError
    from moe_tta.remix.serving import ServedStore, ServedTokens
    from moe_tta.rounds import AskedRounds
    from moe_tta.settings import AdapterSettings
    from moe_tta.shape import RouterShape


def items(*names: str) -> BeforeValidator:
    """Require a list with one item per name; the message shows the form."""
    form = f"expected [{', '.join(names)}]"
    forms, count = (list, tuple), len(names)

    def check(value: Any) -> Any:
        if not isinstance(value, forms) or len(value) != count:
            raise PydanticCustomError("items", form)
        return value

    return BeforeValidator(check)


LayerRange = Annotated[tuple[int, int], Strict(False), items("first", "last")]


class StrategyParams(BaseModel):
    """What every strategy takes; JSON in, so scalars are strict and never coerced.

    Attributes:
        span: Which positions to act on.
        layers: First and last decoder layer to act on, both included.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False
    )

    span: Span = "all"
    layers: LayerRange | None = None

    def inline_edits(self) -> tuple[str, ...]:
        """Name the given members that edit experts without a registered artefact."""
        return ()

    def in_rounds(self) -> bool:
        """Whether the worker computes a part of the plan, by `Strategy.rounds`."""
        return False


def _no_tokenizer(text: str) -> Sequence[int]:
    raise RequestError("this engine has no tokenizer", "")


@dataclass(frozen=True)
class Prompt:
    """A request's prompt, up to where it ends for the plans.

    Attributes:
        token_ids: Its tokens; `None` where the client sent embeddings.
        decode: Turns tokens into text. Raises `RequestError` where the engine cannot.
        encode: Turns text into tokens, as prompts are; raises like `decode`.
    """

    token_ids: Sequence[int] | None
    decode: Callable[[Sequence[int]], str]
    encode: Callable[[str], Sequence[int]] = _no_tokenizer

    @cached_property
    def text(self) -> str:
        """The prompt as text, without special tokens.

        Raises:
            RequestError: it has none.
        """
        if self.token_ids is None:
            raise RequestError("prompt embeddings have no text", "")
        return self.decode(self.token_ids)


@dataclass(frozen=True)
class PlanContext:
    """What a strategy may look at.

    Attributes:
        shape: The model's routers.
        artefacts: The operator's artefacts by name.
        stores: The operator's reference stores by name; an error is one that cannot
            be used.
        prompt: The request's prompt, for strategies that read it.
        adapter: The operator's limits on work in rounds; `None` where there is none.
    """

    shape: RouterShape
    artefacts: Mapping[str, Artefact] = field(default_factory=dict)
    stores: Mapping[str, ServedStore | ServedTokens | StoreError] = field(
        default_factory=dict
    )
    prompt: Prompt | None = None
    adapter: AdapterSettings | None = None


@dataclass(frozen=True)
class Strategy:
    """One strategy family.

    Attributes:
        name: Its member in the request object.
        params: Its parameters, checked without a model.
        plan: Writes the plan. Raises `RequestError` with a path relative to the
            strategy's member. `span` is not its business: the compiler reads it.
        check: Of a strategy whose plan depends on the prompt: refuses what can be
            refused without one, as `plan` would. Its requests are planned anew for
            each prompt.
        rounds: Of a strategy whose parameters may say `in_rounds`: what the worker
            then does for a request, or `None` if this prompt needs nothing.
    """

    name: str
    params: type[StrategyParams]
    plan: Callable[[Any, PlanContext], RoutingPlan]
    check: Callable[[Any, PlanContext], None] | None = None
    rounds: Callable[[Any, PlanContext], AskedRounds | None] | None = None


class PairParams(BaseModel):
    """What every strategy takes that runs a request under two routings.

    Attributes:
        weak: The second stream's routing: a request object without pairs.
        strong: The first stream's routing, whose request is answered; default the
            model's own.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False
    )

    weak: dict[str, Any]
    strong: dict[str, Any] = {}


@dataclass(frozen=True)
class PairStrategy:
    """A family that reads each text twice and combines the two streams' logits.

    Attributes:
        name: Its member in the request object.
        params: Its parameters, checked without a model.
        combination: Names the combination of logits (`kernels.contrast.COMBINE`) and
            gives its numbers, from the parameters.
        shorthands: Members that `weak` takes besides, each with the strategy and the
            member it stands for.
    """

    name: str
    params: type[PairParams]
    combination: Callable[[Any], tuple[str, tuple[float, ...]]]
    shorthands: Mapping[str, tuple[str, str]] = field(default_factory=dict)


def as_ranges(numbers: tuple[int, ...]) -> str:
    """Write ascending integers as `0-3, 7, 9-11`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def layers_in(shape: RouterShape, layers: tuple[int, int] | None) -> np.ndarray:
    """Return bool [L]: which MoE layers a strategy's `layers` covers.

    Raises:
        RequestError: the range is empty, leaves the model or holds no MoE layer.
    """
    if layers is None:
        return np.ones(len(shape.layers), bool)
    numbers = np.array(shape.layers)
    first, last = layers
    end = shape.num_hidden_layers - 1
    if not 0 <= first <= last <= end:
        raise RequestError(
            f"expected 0 <= first <= last <= {end}, got {show(layers)}",
            "layers",
            layers,
        )
    covered = (numbers >= first) & (numbers <= last)
    if not covered.any():
        raise RequestError(
            f"expected a range with MoE layers ({as_ranges(shape.layers)}), "
            f"got {show(layers)}",
            "layers",
            layers,
        )
    return covered
