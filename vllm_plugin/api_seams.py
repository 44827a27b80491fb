# SPDX-License-Identifier: Apache-2.0
"""Seams in the API process. Each function takes vLLM's own and returns ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moe_tta.vllm_plugin.compat import wrap


def init_admission(original: Callable) -> Callable:
    """Read settings and model once, where a mistake stops the engine."""

    def init(self, vllm_config, *args, **kwargs):
        from moe_tta.vllm_plugin.admission import Admission
        from moe_tta.vllm_plugin.texts import PromptReader

        original(self, vllm_config, *args, **kwargs)
        self.moe_tta = Admission(vllm_config)
        self.moe_tta_reader = PromptReader(self)

    return init


def admit(original: Callable) -> Callable:
    """Compile each request on its way in; bad ones never reach the engine."""
    from moe_tta.vllm_plugin.aside import compiled_aside

    def process_inputs(self, request_id, prompt, params, *args, **kwargs):
        resumable = bool(kwargs.get("resumable"))
        plan = compiled_aside.get() or self.moe_tta.compile(params, resumable)
        params = self.moe_tta.without_object(params)
        request = original(self, request_id, prompt, params, *args, **kwargs)
        self.moe_tta.attach(request, plan, self.moe_tta_reader)
        return request

    return process_inputs


def refuse_unadmitted(original: Callable) -> Callable:
    """Refuse engine requests that were built by hand and never passed admission."""

    def assign_request_id(request):
        from moe_tta.vllm_plugin.admitted import check_admitted

        check_admitted(request)
        return original(request)

    return staticmethod(assign_request_id)


def mark_offline(original: Callable) -> Callable:
    """`LLMEngine` is the offline engine; servers run `AsyncLLM`."""

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.input_processor.moe_tta.offline = True
        _name_model(self)

    return init


def init_server(original: Callable) -> Callable:
    """Check bodies before a stream begins: later, its status is 200 already.

    What takes long to compile gets a thread of its own.
    """

    def init(self, *args, **kwargs):
        from vllm.entrypoints.openai.chat_completion.protocol import (
            ChatCompletionRequest,
        )
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest
        from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

        from moe_tta.vllm_plugin.aside import Aside

        original(self, *args, **kwargs)
        processor = self.input_processor
        self.moe_tta_aside = Aside(processor.moe_tta, processor.moe_tta_reader)
        _name_model(self)
        for body in (ChatCompletionRequest, CompletionRequest, ResponsesRequest):
            body.moe_tta = processor.moe_tta
            wrap(body, "to_sampling_params", _check_body)
        for body in (ChatCompletionRequest, CompletionRequest):
            wrap(body, "to_beam_search_params", _refuse_beams)

    return init


def _name_model(engine: Any) -> None:
    """Tell who counts rounds the model that its metrics are labelled with."""
    name = engine.vllm_config.model_config.served_model_name
    engine.output_processor.moe_tta_model = name


def _check_body(original: Callable) -> Callable:
    def to_sampling_params(self, *args, **kwargs):
        admission = type(self).moe_tta
        admission.check_members(self.model_extra or {})
        params = original(self, *args, **kwargs)
        if self.stream:
            # other bodies are compiled once, on their way into the engine
            admission.compile(params, resumable=False)
        return params

    return to_sampling_params


def _refuse_beams(original: Callable) -> Callable:
    """Beam search drops `vllm_xargs`, and our member with it."""

    def to_beam_search_params(self, *args, **kwargs):
        type(self).moe_tta.check_beams(self.vllm_xargs or {})
        return original(self, *args, **kwargs)

    return to_beam_search_params
