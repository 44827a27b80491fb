# SPDX-License-Identifier: Apache-2.0
"""Where the plugin meets vLLM: its versions, its seams, its small services.

Another version of vLLM is added here, in the two seam files, `api_seams` (the API
process) and `runner_seams` (workers), and in the scheduler's: `lockstep`,
`pair_scheduler` and `pairs`, whose reliance on vLLM `upstream` pins. Nothing else
imports vLLM, but `verify_engine`, which uses it as any user does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import vllm

if TYPE_CHECKING:
    from moe_tta.errors import RequestError

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


def wrap(owner: Any, name: str, make: Callable[[Callable], Callable]) -> None:
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
    from vllm.config import SchedulerConfig, VllmConfig
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState
    from vllm.v1.metrics.loggers import StatLoggerManager
    from vllm.v1.worker.worker_base import WorkerBase, WorkerWrapperBase

    from moe_tta.vllm_plugin import (
        api_seams,
        aside,
        pair_metrics,
        pathways,
        round_seams,
        runner_seams,
    )

    wrap(InputProcessor, "__init__", api_seams.init_admission)
    wrap(InputProcessor, "process_inputs", api_seams.admit)
    wrap(InputProcessor, "assign_request_id", api_seams.refuse_unadmitted)
    wrap(LLMEngine, "__init__", api_seams.mark_offline)
    wrap(AsyncLLM, "__init__", api_seams.init_server)
    wrap(AsyncLLM, "add_request", aside.add_aside)
    wrap(OutputProcessor, "process_outputs", round_seams.take_reports)
    wrap(RequestState, "_new_completion_output", round_seams.show_reports)
    wrap(StatLoggerManager, "__init__", pair_metrics.init_counts)
    wrap(StatLoggerManager, "record", pair_metrics.record_counts)
    wrap(VllmConfig, "compute_hash", _hash_with_plugin)
    wrap(SchedulerConfig, "get_scheduler_cls", _schedule_pairs)
    wrap(WorkerWrapperBase, "init_device", runner_seams.hook_worker)
    WorkerBase.moe_tta_status = runner_seams.worker_status
    WorkerBase.moe_tta_record = pathways.record
    WorkerBase.moe_tta_take_pathways = pathways.take


def _hash_with_plugin(original: Callable) -> Callable:
    """Keep compiled artefacts of stock vLLM and of other releases apart."""

    def compute_hash(self, *args, **kwargs):
        from moe_tta import __version__

        return f"{original(self, *args, **kwargs)}-moe_tta{__version__}"

    return compute_hash


def _schedule_pairs(original: Callable) -> Callable:
    """Give the engine a scheduler that knows pairs, where this vLLM has one."""

    def get_scheduler_cls(self):
        from moe_tta.vllm_plugin.pair_limits import scheduler_reason

        scheduler_cls = original(self)
        reason = scheduler_reason(scheduler_cls)
        if reason is not None:
            _warn_once(f"moe-tta refuses requests with contrast: {reason}")
            return scheduler_cls
        from moe_tta.vllm_plugin.pair_scheduler import paired

        return paired(scheduler_cls)

    return get_scheduler_cls


@functools.cache
def _warn_once(message: str) -> None:
    get_logger(__name__).warning(message)


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


def is_plain_softmax_router(router: Any) -> bool:
    """Return whether the router does nothing but call vLLM's `topk_softmax`."""
    from vllm._aiter_ops import rocm_aiter_ops
    from vllm.model_executor.layers.fused_moe.router.fused_topk_router import (
        FusedTopKRouter,
    )

    return (
        type(router) is FusedTopKRouter
        and router.scoring_func == "softmax"
        and not rocm_aiter_ops.is_fused_moe_enabled()
    )


def padding_mask(num_tokens: int) -> Any:
    """Return the step's mask of rows that are no token, or `None` without one."""
    from vllm.model_executor.layers.fused_moe.router import fused_topk_router

    return fused_topk_router._get_padding_mask(num_tokens)


def is_triton_experts(experts: Any) -> bool:
    """Return whether these are vLLM's own Triton experts, no variant of them."""
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

    return type(experts) is TritonExperts


def leave_out_unused_columns() -> None:
    """Make vLLM's Triton experts leave columns of id -1 out of their sum.

    The class is changed, not one layer's experts, which vLLM may make anew.
    """
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

    from moe_tta.kernels.used_sum import sum_used_columns

    def make(original):
        def moe_sum(self, input, output, topk_ids=None, expert_map=None):
            if topk_ids is None or expert_map is not None:
                original(self, input, output, topk_ids, expert_map)
            else:
                sum_used_columns(input, output, topk_ids)

        return moe_sum

    wrap(TritonExperts, "moe_sum", make)


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
