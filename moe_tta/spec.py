# SPDX-License-Identifier: Apache-2.0
"""The request object: parsing, and what a server lets clients send."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError
from pydantic import create_model as _create_model

from moe_tta.errors import RequestError, did_you_mean, from_validation, show
from moe_tta.strategies import PAIRS, STRATEGIES, StrategyParams
from moe_tta.strategies.base import PairParams

PARAMETER = "moe_tta"
MAX_JSON_CHARS = 1 << 20  # a dense bias over 58 x 256 experts fits

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"  # of presets and artefacts

Name = Annotated[str, StringConstraints(pattern=NAME)]
RenormName = Literal["model", "always", "never"]


@dataclass(frozen=True)
class RequestSpec:
    """A well-formed request, not yet checked against a model.

    Attributes:
        members: Parameters of the strategies the request names.
        renorm: Applies to every layer and position, whatever the strategies' spans.
        preset: The operator's preset it came from, if it did.
        root: Path of the object it was read from, in the user's view.
        pair: The second stream, if the request asks for one.
    """

    members: Mapping[str, StrategyParams] = field(default_factory=dict)
    renorm: RenormName = "model"
    preset: str | None = None
    root: str = PARAMETER
    pair: PairSpec | None = None


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
    **{name: (item.params | None, None) for name, item in PAIRS.items()},
)


def parse(value: Any, *, presets: Mapping[str, RequestSpec]) -> RequestSpec:
    """Read what a request carries under `moe_tta`.

    Args:
        value: A dict (offline), or a string: a JSON object where it starts with `{`,
            else the name of a preset. numpy numbers and arrays count as numbers
            and lists.
        presets: The operator's presets by name.

    Raises:
        RequestError: anything else; no other exception leaves this function.
    """
    if isinstance(value, str):
        if not value.lstrip().startswith("{"):
            return _preset(value, presets)
        if len(value) > MAX_JSON_CHARS:
            raise RequestError(
                f"expected at most {MAX_JSON_CHARS} characters, got {len(value)}",
                PARAMETER,
            )
        return _from_tree(_load(value))
    if isinstance(value, Mapping):
        return _from_tree(as_json(value))
    raise RequestError(
        f"expected an object or the name of a preset, got {show(value)}",
        PARAMETER,
        value,
    )


def check_inline(spec: RequestSpec, allow_inline: bool) -> None:
    """Refuse edits of experts the client chose itself, unless the operator allows.

    A client must not be able to silence the experts that make a model safe. Presets
    and masks are the operator's own; dynamic_k and renorm name no expert.

    Raises:
        RequestError: the request edits experts inline and may not.
    """
    if allow_inline or spec.preset is not None:
        return
    for stream in (spec, spec.pair.weak) if spec.pair else (spec,):
        for name, params in stream.members.items():
            for member in params.inline_edits():
                raise RequestError(
                    "this server refuses inline expert edits; use a mask or preset "
                    "of the operator, who can also set allow_inline in "
                    "--additional-config",
                    f"{stream.root}.{name}.{member}",
                )


def _preset(name: str, presets: Mapping[str, RequestSpec]) -> RequestSpec:
    if name not in presets:
        raise RequestError(
            f"unknown preset {show(name)}; {did_you_mean(name, presets)}",
            PARAMETER,
            name,
        )
    return presets[name]


def _from_tree(tree: Any) -> RequestSpec:
    given = _validated(_RequestObject, tree, PARAMETER)
    pairs = [name for name in PAIRS if getattr(given, name) is not None]
    if not pairs:
        return _plan_spec(given, PARAMETER)
    name, *others = pairs
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
    return replace(strong, pair=_pair_spec(name, params, f"{root}.weak"))


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
        return (STRATEGIES.get(name) or PAIRS[name]).params.model_fields.keys()

    try:
        return model.model_validate(tree)
    except ValidationError as err:
        raise from_validation(err, root, members) from None


def _load(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_no_repeats)
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError as err:
        reason = str(err)
    raise RequestError(f"expected a JSON object: {reason}", PARAMETER, text)


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in pairs:
        if key in tree:
            raise ValueError(f"key {show(key)} is given twice")
        tree[key] = value
    return tree


def as_json(value: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the same object with JSON types only.

    Raises:
        RequestError: something in it has no JSON form.
    """
    try:
        return _load(json.dumps(dict(value), default=_plain))
    except RecursionError:
        reason = "it is nested too deeply"
    except (TypeError, ValueError) as err:
        reason = str(err)
    raise RequestError(f"expected what JSON can hold: {reason}", PARAMETER)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} has no JSON form")
