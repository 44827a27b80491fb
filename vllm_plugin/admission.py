# SPDX-License-Identifier: Apache-2.0
"""Admission, in the API process: check a request, compile its plans, set its salt."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from moe_tta.artefact import Artefact, load_artefact
from moe_tta.compiled import CompiledRequest, check_client_salt
from moe_tta.deferred import DeferredRequest, compile_or_defer
from moe_tta.errors import RequestError
from moe_tta.settings import ROOT, SettingsError
from moe_tta.spec import (
    PARAMETER,
    RequestSpec,
    as_text,
    check_inline,
    parse,
    parse_text,
)
from moe_tta.strategies import PlanContext, Prompt
from moe_tta.vllm_plugin import compat, request_parts, round_limits
from moe_tta.vllm_plugin.model_shape import shape_from_config
from moe_tta.vllm_plugin.options import read_settings
from moe_tta.vllm_plugin.pair_limits import engine_reason
from moe_tta.vllm_plugin.pair_metrics import count_refused
from moe_tta.vllm_plugin.pairs import PAIR
from moe_tta.vllm_plugin.plan_cache import PlanCache
from moe_tta.vllm_plugin.request_parts import prompt_len
from moe_tta.vllm_plugin.round_orders import ROUNDS
from moe_tta.vllm_plugin.stores import open_stores


class Admission:
    """Turns a request's `moe_tta` object into plans, or into an HTTP 400.

    Built once per API process, from the operator's settings and the model's config;
    bad settings and artefacts that do not fit the model stop the engine here.
    `offline` lifts the ban on inline expert edits, which protects servers.

    A body seen before is not compiled again. That is safe because settings, presets,
    artefacts and shape never change in the life of a process, and `offline` is only
    ever set, so that what was allowed stays allowed.
    """

    def __init__(self, vllm_config: Any):
        self.vllm_config = vllm_config
        self.settings = read_settings(vllm_config)
        self.offline = False
        self.cache = PlanCache()
        config = vllm_config.model_config.hf_text_config
        self.shape = shape_from_config(config, self.settings.k_max)
        self.context = None
        if self.shape is not None:
            stores = open_stores(self.settings, vllm_config, self.shape)
            self.context = PlanContext(
                self.shape,
                self._load_artefacts(),
                stores,
                adapter=self.settings.adapter,
            )
            self._check_registered()

    def _load_artefacts(self) -> dict[str, Artefact]:
        artefacts = {}
        for name, path in self.settings.artefacts.items():
            artefacts[name] = load_artefact(path)
            artefacts[name].check(self.shape)
        return artefacts

    def _check_registered(self) -> None:
        """Compile what the operator registered: it must not fail at a request."""
        specs = {f"presets.{n}": spec for n, spec in self.settings.presets.items()}
        for name in self.settings.artefacts:
            specs[f"artefacts.{name}"] = parse({"steer": {"mask": name}}, presets={})
        for where, spec in specs.items():
            try:
                self._compile_spec(spec)
            except RequestError as err:
                raise SettingsError(f"{ROOT}.{where}: {err}") from err

    def compile(
        self, params: Any, resumable: bool
    ) -> CompiledRequest | DeferredRequest | None:
        """Compile what a request asks for; `None` when it asks for nothing.

        Args:
            params: vLLM's sampling or pooling parameters, not changed.
            resumable: Whether the request's prompt may grow later.

        Raises:
            VLLMValidationError: anything wrong with the request; servers answer 400.
        """
        extra_args = getattr(params, "extra_args", None) or {}
        try:
            self._check_keys(extra_args)
            value = extra_args.get(PARAMETER, self.settings.default)
            if value is None:
                return None
            return self._compile(value, resumable, PARAMETER in extra_args)
        except RequestError as err:
            raise compat.request_error(err) from None

    def check_members(self, ignored: Iterable[str]) -> None:
        """Refuse our member beside `vllm_xargs`, where vLLM ignores it.

        Args:
            ignored: Names in a body that vLLM does not know.

        Raises:
            VLLMValidationError: one of them is meant for us.
        """
        for name in ignored:
            if name.replace("-", "_").startswith(PARAMETER):
                message = "expected inside vllm_xargs, not beside it"
                raise compat.request_error(RequestError(message, name))

    def check_beams(self, xargs: Iterable[str]) -> None:
        """Refuse beam search, which would ignore what the request asks of routing.

        Args:
            xargs: Names in the body's `vllm_xargs`.

        Raises:
            VLLMValidationError: one of them is ours.
        """
        if PARAMETER in xargs:
            message = "beam search does not carry it; use n with a temperature"
            raise compat.request_error(RequestError(message, PARAMETER))

    def _check_keys(self, extra_args: dict[str, Any]) -> None:
        for key in extra_args:
            if key != PARAMETER and str(key).replace("-", "_").startswith(PARAMETER):
                raise RequestError(
                    f"unknown parameter; everything goes into one {PARAMETER!r}",
                    str(key),
                    key,
                )

    def _compile(
        self, value: Any, resumable: bool, own: bool
    ) -> CompiledRequest | DeferredRequest | None:
        if self.context is None:
            if not own:
                return None
            raise RequestError(
                "this model has no MoE layers to route", PARAMETER, value
            )
        if resumable:
            raise RequestError(
                "streaming input is not supported: spans need the prompt's length",
                PARAMETER,
                value,
            )
        text = as_text(value)
        compiled = self.cache.get(text)
        if compiled is None:
            spec = parse_text(text, presets=self.settings.presets)
            check_inline(spec, self.offline or self.settings.allow_inline)
            compiled = self._compile_spec(spec)
            if isinstance(compiled, CompiledRequest):
                self.cache.put(text, compiled)
        return compiled

    def _compile_spec(self, spec: RequestSpec) -> CompiledRequest | DeferredRequest:
        """Compile what the model and this engine can honour.

        Raises:
            RequestError: one of them cannot.
        """
        if spec.pair is not None:
            reason = engine_reason(self.vllm_config)
            if reason is not None:
                count_refused(self.vllm_config)
                raise RequestError(reason, f"{PARAMETER}.{spec.pair.name}")
        if spec.adapting is not None:
            enabled = self.settings.adapter is not None
            reason = round_limits.engine_reason(self.vllm_config, enabled)
            if reason is not None:
                raise RequestError(reason, f"{PARAMETER}.{spec.adapting}")
        return compile_or_defer(spec, self.context)

    def without_object(self, params: Any) -> Any:
        """Return `params` without the client's `moe_tta` object, not changed.

        vLLM copies parameters deeply; over an object's lists that takes longer than
        to compile it.
        """
        extra_args = getattr(params, "extra_args", None) or {}
        if PARAMETER not in extra_args:
            return params
        params = copy.copy(params)
        rest = {k: v for k, v in extra_args.items() if k != PARAMETER}
        params.extra_args = rest or None
        return params

    def attach(
        self,
        request: Any,
        asked: CompiledRequest | DeferredRequest | None,
        read: Callable[[Sequence[int] | None], Prompt],
    ) -> None:
        """Put the compiled plans on an engine request, and its cache salt.

        Args:
            request: vLLM's engine request, changed.
            asked: What `compile` returned.
            read: Makes a prompt of its tokens, for plans that need it.

        Raises:
            VLLMValidationError: the client's own salt imitates ours, or the request
                does not fit its prompt.
        """
        own_salt = request.cache_salt
        try:
            check_client_salt(own_salt)
            compiled = self._for_prompt(asked, request, read)
        except RequestError as err:
            raise compat.request_error(err) from None
        pair = None if compiled is None else compiled.pair
        ask = None
        if pair is not None:
            ask = request_parts.second_stream(self.vllm_config, request, pair)
        rounds = None
        if compiled is not None and compiled.rounds is not None:
            rounds = request_parts.rounds(
                self.vllm_config, self.settings.adapter, request, compiled
            )
        params = request.sampling_params
        if params is None or compiled is None:
            return
        # the caller's dict may be shared between requests: replace, never edit
        extra_args = dict(params.extra_args or {})
        if not compiled.neutral:
            extra_args[PARAMETER] = compiled.to_wire()
            salt = compiled.salt(prompt_len(request), own_salt)
            request.cache_salt = own_salt if salt is None else salt
        if ask is not None:
            extra_args[PAIR] = ask.to_wire()
        if rounds is not None:
            extra_args[ROUNDS] = rounds.to_wire()
        params.extra_args = extra_args or None

    def _for_prompt(
        self,
        asked: CompiledRequest | DeferredRequest | None,
        request: Any,
        read: Callable[[Sequence[int] | None], Prompt],
    ) -> CompiledRequest | None:
        if isinstance(asked, DeferredRequest):
            asked = asked.compile(self.context, read(request.prompt_token_ids))
        if asked is not None and asked.prompt_tokens is not None:
            asked.check_prompt(prompt_len(request))
        return asked
