# SPDX-License-Identifier: Apache-2.0
"""What the operator passes by `--additional-config '{"moe_tta": {...}}'`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from moe_tta.errors import RequestError, did_you_mean, from_validation, show
from moe_tta.spec import Name, RequestSpec, parse

ROOT = "additional_config.moe_tta"


def _preset(value: Any) -> RequestSpec:
    if not isinstance(value, dict):
        raise RequestError(f"expected a request object, got {show(value)}", "moe_tta")
    return parse(value, presets={})


class SettingsError(ValueError):
    """Engine settings that make no sense; the message names the setting."""


class AdapterSettings(BaseModel):
    """Whether and how much requests may be adapted while they run.

    Attributes:
        gradients: Whether a model is loaded that takes gradients through the served
            weights. Without one, `reroute` with `spsa` is all that is served, and any
            model and set-up that plans work on will do.
        budget: Tokens that the adapter reads in each step of the engine, on average;
            a unit of its work is never cut.
        max_context: Longest text that it reads: its memory grows with it.
        batch_tokens: Most tokens that it reads of several requests at once, where they
            ask for the same work, each counted as long as the longest, to which
            attention pads it; its memory grows with this, too.
            0 reads each text by itself, so that a request's roundings are its own.
        last_loss: Whether a round by gradients ends with a forward pass that tells its
            loss at the end: one of 2 n + 1 passes, for the report and nothing else.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    gradients: bool = True
    budget: Annotated[int, Field(ge=1)] = 2048
    max_context: Annotated[int, Field(ge=2)] = 4096
    batch_tokens: Annotated[int, Field(ge=0)] = 0
    last_loss: bool = True


class EngineSettings(BaseModel):
    """Engine settings; build them with `read`.

    Attributes:
        allow_inline: Whether HTTP clients may edit experts they name themselves.
        artefacts: Folder of each steering artefact by name.
        stores: Folder of each reference store by name.
        max_store_mib: Most memory, in MiB, that one token store may take.
        presets: Requests by name, trusted as the operator's own.
        default: Preset of requests that carry no `moe_tta`.
        k_max: Widest selection the engine is built for; default the model's top_k.
        trace_dir: Folder for a routing trace of every finished request. A trace
            tells nearly as much as the text: for studies, not for serving.
        adapter: Lets requests be adapted while they run; `None` is off.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    allow_inline: bool = False
    artefacts: dict[Name, str] = {}
    stores: dict[Name, str] = {}
    max_store_mib: Annotated[int, Field(ge=1)] = 2048
    presets: dict[
        Name, Annotated[InstanceOf[RequestSpec], BeforeValidator(_preset)]
    ] = {}
    default: str | None = None
    k_max: Annotated[int, Field(ge=1)] | None = None
    trace_dir: str | None = None
    adapter: AdapterSettings | None = None

    @field_validator("presets", mode="after")
    @classmethod
    def _named(cls, presets: dict[str, RequestSpec]) -> dict[str, RequestSpec]:
        return {name: replace(spec, preset=name) for name, spec in presets.items()}

    @model_validator(mode="after")
    def _default_exists(self) -> EngineSettings:
        if self.default is not None and self.default not in self.presets:
            raise PydanticCustomError(
                "default",
                "default is {name}, which is no preset; {hint}",
                {
                    "name": show(self.default),
                    "hint": did_you_mean(self.default, self.presets),
                },
            )
        return self

    @classmethod
    def read(cls, value: Any) -> EngineSettings:
        """Check the operator's settings.

        Raises:
            SettingsError: names the setting, what was expected and given.
        """
        try:
            return cls.model_validate(value)
        except ValidationError as err:
            raise SettingsError(str(from_validation(err, ROOT, _members))) from None


def _members(loc: tuple[str | int, ...]) -> Collection[str]:
    kind = AdapterSettings if loc[:1] == ("adapter",) else EngineSettings
    return kind.model_fields.keys()
