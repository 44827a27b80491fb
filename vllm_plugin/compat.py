# SPDX-License-Identifier: Apache-2.0
"""Where the plugin meets vLLM: the only file that knows its versions.

Four seams, each wrapped once per process (or per runner instance):
`InputProcessor` (admission, in the API process), `VllmConfig.compute_hash` (compiled
artefacts), `WorkerWrapperBase.init_device` (workers) and the model runner that a
worker then owns, V1 or V2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import vllm

if TYPE_CHECKING:
    from moe_tta.errors import RequestError
    from moe_tta.vllm_plugin.worker import WorkerState

SUPPORTED = "0.32"
MARK = "_moe_tta_wrapped"


def check_version(version: str | None = None) -> None:
    """Fail closed on a vLLM this release was not written for.

    Raises:
        RuntimeError: with the versions and the way out.
    """
    version = version or vllm.__version__
    if ".".join(version.split(".")[:2]) != SUPPORTED:
        raise RuntimeError(
            f"moe-tta supports vLLM {SUPPORTED}.x, found {version}; install a "
            "matching moe-tta, or set MOE_TTA_DISABLE=1 to run vLLM without it"
        )


def _wrap(owner: Any, name: str, make: Callable[[Callable], Callable]) -> None:
    """Replace `owner.name` by `make(original)`, at most once."""
    original = getattr(owner, name)
    if getattr(original, MARK, False):
        return
    made = make(original)
    wrapper = made.__func__ if isinstance(made, staticmethod) else made
    functools.update_wrapper(wrapper, original)
    setattr(wrapper, MARK, True)
    setattr(owner, name, made)


def install() -> None:
    """Wrap the process-wide seams."""
    from vllm.config import VllmConfig
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.worker.worker_base import WorkerBase, WorkerWrapperBase

    _wrap(InputProcessor, "__init__", _init_admission)
    _wrap(InputProcessor, "process_inputs", _admit)
    _wrap(InputProcessor, "assign_request_id", _refuse_unadmitted)
    _wrap(LLMEngine, "__init__", _mark_offline)
    _wrap(AsyncLLM, "__init__", _watch_http_bodies)
    _wrap(VllmConfig, "compute_hash", _hash_with_plugin)
    _wrap(WorkerWrapperBase, "init_device", _hook_worker)
    WorkerBase.moe_tta_status = _worker_status


def _init_admission(original: Callable) -> Callable:
    def init(self, vllm_config, *args, **kwargs):
        from moe_tta.vllm_plugin.admission import Admission

        original(self, vllm_config, *args, **kwargs)
        self.moe_tta = Admission(vllm_config)

    return init


def _admit(original: Callable) -> Callable:
    def process_inputs(self, request_id, prompt, params, *args, **kwargs):
        resumable = bool(kwargs.get("resumable"))
        plan = self.moe_tta.compile(params, resumable)
        request = original(self, request_id, prompt, params, *args, **kwargs)
        self.moe_tta.attach(request, plan)
        return request

    return process_inputs


def _refuse_unadmitted(original: Callable) -> Callable:
    """Refuse engine requests that were built by hand and never passed admission."""

    def assign_request_id(request):
        from moe_tta.vllm_plugin.admission import check_admitted

        check_admitted(request)
        return original(request)

    return staticmethod(assign_request_id)


def _mark_offline(original: Callable) -> Callable:
    """`LLMEngine` is the offline engine; servers run `AsyncLLM`."""

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.input_processor.moe_tta.offline = True

    return init


def _watch_http_bodies(original: Callable) -> Callable:
    """Refuse what vLLM would ignore without a word: our member beside vllm_xargs."""

    def init(self, *args, **kwargs):
        from vllm.entrypoints.openai.chat_completion.protocol import (
            ChatCompletionRequest,
        )
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest
        from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

        original(self, *args, **kwargs)
        for body in (ChatCompletionRequest, CompletionRequest, ResponsesRequest):
            _wrap(body, "to_sampling_params", _refuse_stray_member)

    return init


def _refuse_stray_member(original: Callable) -> Callable:
    def to_sampling_params(self, *args, **kwargs):
        from moe_tta.errors import RequestError

        for name in self.model_extra or {}:
            if name.replace("-", "_").startswith("moe_tta"):
                error = RequestError("expected inside vllm_xargs, not beside it", name)
                raise request_error(error)
        return original(self, *args, **kwargs)

    return to_sampling_params


def _hash_with_plugin(original: Callable) -> Callable:
    """Keep compiled artefacts of stock vLLM and of other releases apart."""

    def compute_hash(self, *args, **kwargs):
        from moe_tta import __version__

        return f"{original(self, *args, **kwargs)}-moe_tta{__version__}"

    return compute_hash


def _hook_worker(original: Callable) -> Callable:
    def init_device(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        hook_runner(self.worker.model_runner)
        return result

    return init_device


def hook_runner(runner: Any) -> None:
    """Follow one model runner: arm after loading, stage rows before each step."""
    from moe_tta.vllm_plugin.worker import WorkerState

    state: WorkerState = WorkerState(runner.vllm_config, runner.device)
    runner.moe_tta = state

    def load_model(original):
        def wrapped(*args, **kwargs):
            result = original(*args, **kwargs)
            state.arm(moe_runners(runner.vllm_config))
            return result

        return wrapped

    _wrap(runner, "load_model", load_model)
    if hasattr(runner, "_update_states"):
        _follow_v1(runner, state)
    else:
        _follow_v2(runner, state)


def moe_runners(vllm_config: Any) -> list[Any]:
    """Return the MoE layers of the loaded model, by decoder layer."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner_interface import (
        MoERunnerInterface,
    )

    layers = vllm_config.compilation_config.static_forward_context.values()
    runners = [layer for layer in layers if isinstance(layer, MoERunnerInterface)]
    return sorted(runners, key=lambda runner: runner.layer_id)


def _follow_v1(runner: Any, state: WorkerState) -> None:
    """V1 runner: the batch order is final after `_update_states`."""

    def update_states(original):
        def wrapped(scheduler_output):
            state.requests_changed(
                scheduler_output.finished_req_ids, scheduler_output.scheduled_new_reqs
            )
            return original(scheduler_output)

        return wrapped

    def prepare_inputs(original):
        def wrapped(scheduler_output, num_scheduled_tokens):
            batch = runner.input_batch
            state.stage(
                batch.req_ids,
                num_scheduled_tokens,
                batch.num_computed_tokens_cpu[: batch.num_reqs],
            )
            return original(scheduler_output, num_scheduled_tokens)

        return wrapped

    _wrap(runner, "_update_states", update_states)
    _wrap(runner, "_prepare_inputs", prepare_inputs)


def _follow_v2(runner: Any, state: WorkerState) -> None:
    """V2 runner: resumed requests come back as new ones, with their full text."""

    def add_requests(original):
        def wrapped(scheduler_output):
            state.requests_changed(
                scheduler_output.finished_req_ids, scheduler_output.scheduled_new_reqs
            )
            return original(scheduler_output)

        return wrapped

    def prepare_inputs(original):
        def wrapped(*args, **kwargs):
            batch = original(*args, **kwargs)
            state.stage(
                batch.req_ids, batch.num_scheduled_tokens, batch.num_computed_tokens_np
            )
            return batch

        return wrapped

    _wrap(runner, "add_requests", add_requests)
    _wrap(runner, "prepare_inputs", prepare_inputs)


def _worker_status(worker: Any) -> dict[str, Any]:
    """`collective_rpc("moe_tta_status")`: what this worker armed and holds."""
    return worker.model_runner.moe_tta.status()


def copy_to_device(source: Any, out: Any) -> None:
    """Copy a numpy array into a device tensor without waiting for it."""
    from vllm.utils.torch_utils import async_tensor_h2d

    async_tensor_h2d(source, out=out)


def request_error(error: RequestError) -> Exception:
    """Return the error as one that vLLM's servers answer with HTTP 400."""
    from vllm.exceptions import VLLMValidationError

    return VLLMValidationError(
        error.message, parameter=error.parameter, value=error.value
    )


def get_logger(name: str) -> Any:
    """Return a logger under vLLM's name space; others are not shown by default."""
    from vllm.logger import init_logger

    return init_logger(f"vllm.{name}")


def layer_name_argument(layer_name: str) -> Any:
    """Encode a layer's name as vLLM passes it to opaque ops."""
    from vllm.utils.torch_utils import _USE_LAYERNAME, LayerName

    return LayerName(layer_name) if _USE_LAYERNAME else layer_name


def running_layer(layer_name: Any) -> Any:
    """Return the layer of the engine whose forward pass is running."""
    from vllm.forward_context import get_forward_context
    from vllm.utils.torch_utils import _resolve_layer_name

    return get_forward_context().no_compile_layers[_resolve_layer_name(layer_name)]


def register_op(
    name: str, implementation: Callable, fake: Callable, mutates: list[str]
) -> None:
    """Register `torch.ops.moe_tta.<name>` for the platform's device."""
    from vllm.utils.torch_utils import direct_register_custom_op

    direct_register_custom_op(
        op_name=name,
        op_func=implementation,
        mutates_args=mutates,
        fake_impl=fake,
        target_lib=_library(),
    )


@functools.cache
def _library() -> Any:
    import torch

    return torch.library.Library("moe_tta", "FRAGMENT")


def __getattr__(name: str) -> Any:
    # the op's schema is inferred from its annotations, so the type must be real
    if name == "LayerNameType":
        from vllm.utils.torch_utils import LayerNameType

        return LayerNameType
    raise AttributeError(name)
