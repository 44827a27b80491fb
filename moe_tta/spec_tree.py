# SPDX-License-Identifier: Apache-2.0
"""From a request's JSON tree to the parameters it names, of one stream or two."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic import create_model as _create_model

from moe_tta.errors import RequestError, from_validation
from moe_tta.strategies import PAIRS, ROUNDS, STRATEGIES, StrategyParams
from moe_tta.strategies.base import PairParams
from moe_tta.strategies.rounds import RoundParams

PARAMETER = "moe_tta"

RenormName = Literal["model", "always", "never"]


@dataclass(frozen=True)
class RequestSpec:
    """A well-formed request, not yet checked against a model.

    Attributes:
        members: Parameters of the strategies the request names.
        renorm: Applies to every layer and position, whatever the strategies' spans.
        prompt_tokens: How many of the first tokens count as the prompt, whatever its
            real length; `None` counts all.
        preset: The operator's preset it came from, if it did.
        root: Path of the object it was read from, in the user's view.
        pair: The second stream, if the request asks for one.
        rounds: What computes its plan anew while it runs, if the request asks for it.
    """

    members: Mapping[str, StrategyParams] = field(default_factory=dict)
    renorm: RenormName = "model"
    prompt_tokens: int | None = None
    preset: str | None = None
    root: str = PARAMETER
    pair: PairSpec | None = None
    rounds: RoundSpec | None = None

    @property
    def adapting(self) -> str | None:
        """Name of the member that is computed in rounds, if the request has one."""
        if self.rounds is not None:
            return self.rounds.name
        names = [name for name, params in self.members.items() if params.in_rounds()]
        return names[0] if names else None


@dataclass(frozen=True)
class RoundSpec:
    """A strategy that works in rounds, and its parameters."""

    name: str
    params: RoundParams


@dataclass(frozen=True)
class PairSpec:
    """A request's second stream.

    Attributes:
        name: The pair strategy that asks for it.
        params: That strategy's parameters.
        weak: The stream's routing.
        shorthands: Paths the client did not write, and those it wrote instead.
    """

    name: str
    params: PairParams
    weak: RequestSpec
    shorthands: Mapping[str, str]


class _Common(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    renorm: RenormName = "model"


_PlanObject = _create_model(
    "PlanObject",
    __base__=_Common,
    **{name: (item.params | None, None) for name, item in STRATEGIES.items()},
)
_RequestObject = _create_model(
    "RequestObject",
    __base__=_PlanObject,
    prompt_tokens=(Annotated[int, Field(ge=1)] | None, None),
    **{name: (item.params | None, None) for name, item in (PAIRS | ROUNDS).items()},
)


def from_tree(tree: Any) -> RequestSpec:
    """Read a request object.

    Raises:
        RequestError: it is malformed; the path says where.
    """
    given = _validated(_RequestObject, tree, PARAMETER)
    pairs = [name for name in PAIRS if getattr(given, name) is not None]
    rounds = _rounds_of(given)
    if not pairs:
        spec = _plan_spec(given, PARAMETER)
        if rounds is not None and spec.adapting is not None:
            raise RequestError(
                f"expected not beside {rounds.name}: one of them can change the plan",
                f"{PARAMETER}.{spec.adapting}",
            )
        return replace(spec, prompt_tokens=given.prompt_tokens, rounds=rounds)
    name, *others = pairs
    if given.prompt_tokens is not None:
        raise RequestError(
            f"expected not beside {name}, whose streams end with the real prompt",
            f"{PARAMETER}.prompt_tokens",
        )
    if rounds is not None:
        raise RequestError(
            f"expected not beside {name}, whose streams keep their plans",
            f"{PARAMETER}.{rounds.name}",
        )
    params = getattr(given, name)
    others += [m for m in STRATEGIES if getattr(given, m) is not None]
    others += ["renorm"] if given.renorm != "model" else []
    root = f"{PARAMETER}.{name}"
    if others:
        raise RequestError(
            f"expected inside {root}.strong or {root}.weak, not beside {name}",
            f"{PARAMETER}.{others[0]}",
        )
    strong = _plan_spec(
        _validated(_PlanObject, params.strong, f"{root}.strong"), f"{root}.strong"
    )
    pair = _pair_spec(name, params, f"{root}.weak")
    for stream in (strong, pair.weak):
        if stream.adapting is not None:
            raise RequestError(
                f"expected not in {name}, whose streams keep their plans",
                f"{stream.root}.{stream.adapting}",
            )
    return replace(strong, pair=pair)


def _rounds_of(given: Any) -> RoundSpec | None:
    found = [
        RoundSpec(name, params)
        for name in ROUNDS
        if (params := getattr(given, name)) is not None
    ]
    if len(found) > 1:
        raise RequestError(
            f"expected not beside {found[0].name}: one of them can change the plan",
            f"{PARAMETER}.{found[1].name}",
        )
    return found[0] if found else None


def _pair_spec(name: str, params: PairParams, root: str) -> PairSpec:
    """Read the weak stream, its shorthands written out."""
    shorthands, tree, written = PAIRS[name].shorthands, dict(params.weak), {}
    for short, (strategy, member) in shorthands.items():
        value = tree.pop(short, None)
        if value is None:
            continue
        if strategy in tree:
            raise RequestError(
                f"expected one of {', '.join(shorthands)} and {strategy}", root
            )
        tree[strategy] = {member: value}
        written[f"{root}.{strategy}.{member}"] = f"{root}.{short}"
        written[f"{root}.{strategy}"] = f"{root}.{short}"
    try:
        weak = _validated(_PlanObject, tree, root, shorthands)
    except RequestError as err:
        raise err.renamed(written) from None
    return PairSpec(name, params, _plan_spec(weak, root), written)


def _plan_spec(given: Any, root: str) -> RequestSpec:
    members = {
        name: params
        for name in STRATEGIES
        if (params := getattr(given, name)) is not None
    }
    return RequestSpec(members, given.renorm, root=root)


def _validated(
    model: type[BaseModel], tree: Any, root: str, besides: Collection[str] = ()
) -> Any:
    """Return the object as `model`; `besides` are more members it could have had."""

    def members(loc: tuple[str | int, ...]) -> Collection[str]:
        """Return the names the object at `loc` may hold."""
        if not loc:
            return {*model.model_fields, *besides}
        name = str(loc[0])
        return (STRATEGIES | PAIRS | ROUNDS)[name].params.model_fields.keys()

    try:
        return model.model_validate(tree)
    except ValidationError as err:
        raise from_validation(err, root, members) from None
